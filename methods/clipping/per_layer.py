"""Each group of parameters has a bound of its own, which follows a quantile of the group's norms (He et al., 2212.01539)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients, Values
from dpft.methods.clipping.base import Adaptive

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.queries import Seen

COUNTS = "counts"


class PerLayer(Adaptive):
    """Of each group g: T_g <- T_g exp(-eta (b_g - q)), b_g the released share of its gradients within T_g; its bound is C_g.

    eta: `clip_rate`; q: `target_quantile`. `total=fixed`: C_g = C T_g / sqrt(sum T^2), so that the bounds keep their proportions
    and the whole stays at the run's clip norm C. `total=quantiles`: C_g = T_g, and C = sqrt(sum T^2) follows them: that is the
    paper's Algorithm 1. Noise is sigma C on every layer (the paper's noise allocation "global"). With one group the first is a
    fixed C, and the second is clipping `quantile`.
    Counts are held against T_g and not against C_g: where the whole is far too small or too large, every group would count the
    same, and rescaling would undo all that they learn.
    The G counts are one release: entries +1/2 and -1/2, of length sqrt(G)/2 (uncentred it would be twice that), for
    `count_share` r = .01 of the gradient's budget, as in the paper: noise sigma sqrt(G)/(2 sqrt(r)) in each count. It grows with
    G: with 30 groups and sigma .5 it is 14 examples, so small batches learn slowly. T_g starts at C/sqrt(G). A group of which a
    step asks nothing is not counted, and keeps its bound. B is the expected batch size.
    Prediction: at a fixed whole it gains where layers' norms differ by much, less than a point over flat clipping under Adam.
    """

    name = "per-layer"
    summary = "one C per group, each follows a quantile of the group's norms by noisy counts; the whole stays at C"
    reference = "arXiv:2212.01539"
    options: ClassVar = {**Adaptive.options, "target_quantile": 0.5, "count_share": 0.01, "total": "fixed"}
    choices: ClassVar = {"total": ("fixed", "quantiles")}
    ranges: ClassVar = {**Adaptive.ranges, "target_quantile": (0.0, 1.0), "count_share": (1e-6, 0.5)}

    def validate(self, spec, asks):
        super().validate(spec, asks)
        if spec.clip_groups == "flat":
            raise BadInput(
                "Clipping per-layer gives each group of parameters a bound of its own, and clip_groups=flat is one group; set "
                "clip_groups to layer or block."
            )

    def start(self, spec, noise_multiplier, groups=None, model=None):
        super().start(spec, noise_multiplier, groups, model)
        self._members = {"": ()} if groups is None else groups
        self._each = 1 / math.sqrt(len(self._members))  # where a threshold starts, and its range, in those of C
        self.thresholds = dict.fromkeys(self._members, self.clip_norm * self._each)

    @property
    def bounds(self) -> dict[str, float]:
        """C_g of every group; the root of the sum of their squares is C."""
        scale = self.clip_norm / math.hypot(*self.thresholds.values())
        return {group: scale * t for group, t in self.thresholds.items()}

    def shares(self):
        return {COUNTS: self.settings["count_share"]}

    def amend(self, gradient):
        self._counted = [group for group, names in self._members.items() if any(asked(gradient, n) for n in names)]
        bounded = replace(gradient, bound=self.bounds)
        if not self._counted:
            return bounded, {}
        columns = [i for i, group in enumerate(self._members) if group in self._counted]
        of = partial(within_each, columns=columns, thresholds=[self.thresholds[group] for group in self._counted])
        return bounded, {COUNTS: Values(size=len(columns), of=of, bound=math.sqrt(len(columns)) / 2)}

    def learn(self, gradient, beside):
        found = beside[COUNTS].values.tolist() if COUNTS in beside else []
        least, most = (self._each * end for end in self._range)
        for group, value in zip(self._counted, found, strict=bool(found)):
            error = self.settings["target_quantile"] - min(max(0.5 + value, 0.0), 1.0)
            moved = self.thresholds[group] * math.exp(self.settings["clip_rate"] * error)
            self.thresholds[group] = min(max(moved, least), most)
        self._follow()

    def _follow(self) -> None:
        if self.settings["total"] == "quantiles":
            self.clip_norm = math.hypot(*self.thresholds.values())

    def state_dict(self):
        import torch

        return {"thresholds": torch.tensor(list(self.thresholds.values()), dtype=torch.float64)}

    def load_state_dict(self, state):
        self.thresholds = dict(zip(self._members, state["thresholds"].tolist(), strict=True))
        self._follow()


def asked(gradient: Gradients, name: str) -> bool:
    """Whether anything is asked of the gradient of the parameter called `name`."""
    encoding = gradient.encodings.get(name)
    sides = () if encoding is None else (encoding.left, encoding.right)
    nothing = any(side is not None and not side.shape[-1] for side in sides)
    return not nothing and (gradient.only is None or name in gradient.only)


def within_each(seen: Seen, columns: Sequence[int], thresholds: Sequence[float]) -> torch.Tensor:
    """[batch, columns]: 1/2 where a group's gradient is no longer than its threshold, else -1/2."""
    lengths = seen.lengths[:, list(columns)].double()
    return (lengths <= lengths.new_tensor(thresholds)).double() - 0.5

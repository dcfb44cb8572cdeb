"""The bound follows a quantile of the gradients' norms (Andrew et al., 1905.03871)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Values
from dpft.methods.clipping.base import Adaptive, whole

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.queries import Seen

COUNT = "count"


class Quantile(Adaptive):
    """C follows the `target_quantile` of the norms: C <- C exp(-eta (b - gamma)), b the released share of gradients within C.

    eta: `clip_rate`. Each step releases sum_i (1[norm_i <= C] - 1/2) beside the gradient, a sum of sensitivity 1/2 (centred: an
    uncentred count would have 1, for twice the noise; a gradient of zero counts as within C), and b = 1/2 + that/B, cut to
    [0, 1]; B is the expected batch size, so that b is a function of the release alone.
    The count gets `count_share` of the gradient's budget: noise sigma/(2 sqrt(count_share)) in counts, 5 sigma by default, and
    the gradient 0.5% more. It depends on no sigma, so that a plan can show it before sigma is found. The paper gives the count
    noise B/20 instead, a share of (10 sigma/B)^2: .0006 at B = 256 and sigma = .6, with four times our noise in b.
    """

    name = "quantile"
    summary = "C follows a quantile of the gradients' norms, by a second release: a noisy count of those within C"
    reference = "arXiv:1905.03871"
    options: ClassVar = {**Adaptive.options, "target_quantile": 0.5, "count_share": 0.01}
    ranges: ClassVar = {**Adaptive.ranges, "target_quantile": (0.0, 1.0), "count_share": (1e-6, 0.5)}

    def shares(self):
        return {COUNT: self.settings["count_share"]}

    def amend(self, gradient):
        count = Values(size=1, of=partial(within, clip_norm=self.clip_norm), bound=0.5)
        return super().amend(gradient)[0], {COUNT: count}

    def learn(self, gradient, beside):
        share = 0.5 + float(beside[COUNT].values[0])
        self.move(self.settings["target_quantile"] - min(max(share, 0.0), 1.0))


def within(seen: Seen, clip_norm: float) -> torch.Tensor:
    """[batch, 1]: 1/2 for a gradient no longer than `clip_norm`, all groups together, else -1/2."""
    return (whole(seen) <= clip_norm).double()[:, None] - 0.5

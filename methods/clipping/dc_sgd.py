"""The bound follows from a noisy histogram of the gradients' norms (DC-SGD, Wei et al., 2503.22988)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Values
from dpft.methods.clipping.base import Adaptive, whole

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.noisy_sum import NoisySum
    from dpft.harness.query.queries import Seen

HISTOGRAM = "histogram"
CANDIDATES = [i / 10 for i in range(1, 21)]  # of the next C, in those of the present one, as in the authors' code


class DCSGD(Adaptive):
    """Each step releases how many gradients have norms in each of K = `bins` bins, and takes the next C from that alone.

    `chosen_by=error` (DC-SGD-E): the C among .1, .2, ..., 2 times the present one with the least d (sigma C/B)^2 + sum_j h_j
    (m_j - C)_+^2: noise in the d coordinates that are asked for, and what clipping cuts off; h_j: a bin's released share of B,
    m_j: its middle. `chosen_by=percentile` (DC-SGD-P): the middle of the first bin at which h adds up to `target_quantile`.
    A row is one-hot, of length 1, for `histogram_share` of the gradient's budget: noise 7 sigma in each count by default, about
    the 5 or 6 counts of the authors' code at sigma .7 to .8, and the gradient 1% more. Defaults .3 and 20 are theirs.
    The bins are of equal width up to a top that starts at 2C; it doubles when the last bin, where all longer ones are counted,
    has more than half, and halves when the upper half has less than 1/K (the authors' code for E; its P takes 2C throughout,
    so that one noisy first bin cuts C by 20). All of that follows from releases. h is over the expected B: the authors' first
    code divides by the realised batch, which is no function of the release, and searches again until C is inside of the
    candidates; here it goes on in the next step. With groups norms are those of whole gradients, and what is cut off is a guess.
    Prediction: with few parameters C settles near the norms; with millions E sinks far below all of them (d sigma^2/B^2 >> 1),
    which costs Adam nothing and makes SGD slow.
    """

    name = "dc-sgd"
    summary = "C from a noisy histogram of the norms: the least expected squared error, or a percentile"
    reference = "arXiv:2503.22988"
    options: ClassVar = {
        **{key: value for key, value in Adaptive.options.items() if key != "clip_rate"},
        "chosen_by": "error",
        "target_quantile": 0.3,
        "bins": 20,
        "histogram_share": 0.02,
    }
    choices: ClassVar = {"chosen_by": ("error", "percentile")}
    ranges: ClassVar = {
        **{key: value for key, value in Adaptive.ranges.items() if key != "clip_rate"},
        "target_quantile": (0.0, 1.0),
        "bins": (2, 1000),
        "histogram_share": (1e-6, 0.5),
    }

    def start(self, spec, noise_multiplier, groups=None, model=None):
        super().start(spec, noise_multiplier, groups, model)
        self.top = 2 * self.clip_norm

    def shares(self):
        return {HISTOGRAM: self.settings["histogram_share"]}

    def amend(self, gradient):
        bins = self.settings["bins"]
        question = Values(size=bins, of=partial(one_hot, top=self.top, bins=bins), bound=1.0)
        return super().amend(gradient)[0], {HISTOGRAM: question}

    def learn(self, gradient, beside):
        shares = beside[HISTOGRAM].values.tolist()
        bins, width = len(shares), self.top / len(shares)
        middles = [(j + 0.5) * width for j in range(bins)]
        chosen = self._percentile if self.settings["chosen_by"] == "percentile" else self._error
        self.clip_norm = self.kept(chosen(gradient, shares, middles))
        if shares[-1] > 0.5:
            self.top = 2 * self.kept(self.top)
        elif sum(shares[bins // 2 :]) < 1 / bins:
            self.top = 2 * self.kept(self.top / 4)

    def _percentile(self, gradient: NoisySum, shares: list[float], middles: list[float]) -> float:
        together = 0.0
        for share, middle in zip(shares, middles, strict=True):
            together += share
            if together >= self.settings["target_quantile"]:
                return middle
        return middles[-1]

    def _error(self, gradient: NoisySum, shares: list[float], middles: list[float]) -> float:
        d, std = (
            sum(t.numel() for t in gradient.tensors.values()),
            gradient.noise_multiplier / gradient.expected_batch_size,
        )

        def error(c: float) -> float:
            cut = sum(share * max(middle - c, 0.0) ** 2 for share, middle in zip(shares, middles, strict=True))
            return d * (std * c) ** 2 + cut

        return min((self.clip_norm * candidate for candidate in CANDIDATES), key=error)

    def state_dict(self):
        import torch

        return {"clip_norm": torch.tensor([self.clip_norm, self.top], dtype=torch.float64)}

    def load_state_dict(self, state):
        self.clip_norm, self.top = state["clip_norm"].tolist()


def one_hot(seen: Seen, top: float, bins: int) -> torch.Tensor:
    """[batch, bins]: 1 in the bin of the whole gradient's norm, of equal width up to `top`; longer ones are in the last."""
    import torch

    place = (whole(seen) * (bins / top)).nan_to_num(nan=bins).clamp_max(bins - 1).long()
    return torch.zeros(len(place), bins, dtype=torch.float64, device=place.device).scatter_(1, place[:, None], 1.0)

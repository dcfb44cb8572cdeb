"""Removing a whole user of whom at most k examples are sampled one by one: a Gaussian whose shift is random.

How many of k examples a Poisson batch holds is Binomial(k, q), and j of them move a sum by at most j bounds. In units of the
bound the step's pair is N(0, sigma^2) and sum_j p_j N(j, sigma^2): the mixture of Gaussians (2310.15526).
It covers every way in which the contributions may point, several releases on one batch and questions that follow from earlier
answers among them: under the first law the likelihood ratio of any of these is a sum p_j exp(Z_j - Var(Z_j) / 2), and every
convex function of it has its largest mean where all Z_j are one normal times j / sigma (Kahane's inequality: no covariance of two
Z_j is larger than there). Where questions follow from answers, that holds of the last release given all before it; its terms are
then of a normal of their own, so it holds of the one before it given that normal, and so on to the first. A user with fewer
examples is covered by one with k.

The loss grows with the noisy value, so a divergence is that of a threshold t. With l_j(t) the likelihood ratio of a shift by j it
is a sum of positive terms, p_j [S(t - j) - l_j(t) S(t)], and nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dpft.harness.privacy.poisson import Poisson

NEWTON = 60  # rounds: from the right, convex, so they never overshoot


def shifts(group_size: int, q: float) -> tuple[Any, Any]:
    """(1..k, their Binomial(k, q) probabilities): how many of a user's examples a batch holds, where it holds any."""
    import numpy
    from scipy.stats import binom

    counts = numpy.arange(1, group_size + 1)
    return counts, binom.pmf(counts, group_size, q)


def group_delta(sigma: float, group_size: int, q: float, remove: bool) -> Callable[[Any], Any]:
    """eps -> hockey-stick divergence of one step: the mixture against the lone Gaussian (`remove`), or the other way round."""
    import numpy
    from scipy.special import log_ndtr, logsumexp, ndtr

    counts, masses = shifts(group_size, q)
    absent = (1 - q) ** group_size
    with numpy.errstate(divide="ignore"):
        logs, nobody = numpy.log(masses), numpy.log(absent)
    keep = masses > 0
    counts, masses, logs = counts[keep], masses[keep], logs[keep]
    shift = counts / sigma

    def ratios(x: Any) -> Any:
        """Log likelihood ratios of each shift, [points, counts], at values x in standard deviations."""
        return x[:, None] * shift - shift**2 / 2

    def threshold(aim: Any) -> Any:
        """Where the log likelihood ratio of the mixture is `aim`."""
        x = ((aim[:, None] - logs) / shift + shift / 2).min(1)  # each term alone is at most the sum
        for _ in range(NEWTON):
            terms = logs + ratios(x)
            total = numpy.logaddexp(logsumexp(terms, axis=1), nobody)
            slope = (numpy.exp(terms - total[:, None]) * shift).sum(1)
            with numpy.errstate(divide="ignore", invalid="ignore"):
                x = x - numpy.where(slope > 0, (total - aim) / slope, 0.0)
        return x

    def divergence(eps: Any) -> Any:
        eps = numpy.asarray(eps, dtype=float)
        aim = eps if remove else -eps
        inside = aim > nobody  # elsewhere every value is on one side
        found = -numpy.expm1(eps) if remove else numpy.zeros_like(eps)
        t = threshold(aim[inside])
        if remove:
            gaps = ndtr(shift - t[:, None]) - numpy.exp(numpy.minimum(ratios(t) + log_ndtr(-t)[:, None], 0.0))
            scale = 1.0
        else:
            gaps = numpy.exp(ratios(t) + log_ndtr(t)[:, None]) - ndtr(t[:, None] - shift)
            scale = numpy.exp(eps[inside])
        found[inside] = scale * (numpy.clip(gaps, 0.0, None) @ masses)
        return numpy.clip(found, 0.0, 1.0)

    return divergence


@dataclass(frozen=True)
class Grouped(Poisson):
    """Poisson over examples, `group_size` of one protected user at most (2407.07737, ELS): see harness/privacy/groups.py."""

    kind: ClassVar[str] = "grouped"
    poisson: ClassVar[bool] = False
    wider: ClassVar[float] = 4.0  # a fifth of the tolerance; dp-accounting looks for every cell by itself

    group_size: int

    @property
    def together(self) -> int:
        return self.group_size

    def told(self) -> str:
        return f"Poisson sampling of examples, {self.group_size:,} of a user at most"

    def check(self, probability: float, releases: tuple[Any, ...]) -> None:
        if others := sorted({release.mechanism for release in releases} - {"gaussian"}):
            raise ValueError(
                f"several examples of a user in a batch are accounted for with gaussian noise, not {others[0]}"
            )

    def divergence(self, probability: float, sigma: float, remove: bool) -> Callable[[Any], Any]:
        return group_delta(sigma, self.group_size, probability, remove)

    def dp_event(self, probability: float, sigma: float) -> Any:
        from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

        found = [(0, (1 - probability) ** self.group_size), *self.presences(probability)]
        return MixtureOfGaussiansDpEvent(sigma, *zip(*found, strict=True))

    def presences(self, probability: float) -> list[tuple[int, float]]:
        counts, masses = shifts(self.group_size, probability)
        return [(int(count), float(mass)) for count, mass in zip(counts, masses, strict=True)]

    def least_probability(self, probability: float) -> float:
        return -math.expm1(self.group_size * math.log1p(-probability)) if probability < 1 else 1.0

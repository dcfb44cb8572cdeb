"""Checks of what canaries add to releases and of who is in which batch."""

from __future__ import annotations

import numpy
from scipy import stats

from dpft.harness.audit.alarms import Check
from dpft.harness.audit.observe import Observation

FAR = "sensitivity exceeds the clip norm"
UNLIKE = "contributions are not the clipped gradients"
FEW, DRAWS = 20, 20_000


def checks(seen: Observation) -> list[Check]:
    """Those of contributions, and of the batches that the sampler drew."""
    member = seen.member[seen.sampled]
    return [*_contributions(seen), *_batches(member, seen.sampling_probability)]


def _contributions(seen: Observation) -> list[Check]:
    """What the release holds along canaries of the batch, less what clipping leaves of their gradients, on average: of those far
    above the clip norm and of those near it; and along canaries that are absent."""
    off = seen.seen - seen.expected
    far, near, absent = seen.member & seen.far, seen.member & ~seen.far, ~seen.member
    variances = (seen.spread * seen.noise_multiplier[:, None] ** 2).sum(0)
    return [
        _mean("far canaries", seen.seen, off, far, variances[0], FAR, UNLIKE),
        _mean("near canaries", seen.seen, off, near, variances[1], FAR, UNLIKE),
        _mean("absent canaries", seen.seen, seen.seen, absent, variances[2], *["absent examples move the release"] * 2),
    ]


def _mean(name, values, off, chosen, variance, too_much: str, too_little: str) -> Check:
    """Two-sided normal p-value of the sum of `off` over `chosen`, whose noise has that variance."""
    count, total = int(chosen.sum()), float(off[chosen].sum())
    if count == 0 or variance == 0:
        return Check(name, 0.0, 0.0, 1.0, too_much)
    observed = float(values[chosen].mean())
    p = 2 * stats.norm.sf(abs(total) / float(variance) ** 0.5)
    return Check(name, observed, observed - total / count, float(p), too_much if total > 0 else too_little)


def _batches(member: numpy.ndarray, q: float) -> list[Check]:
    """Rate of inclusion; variances of batch sizes and of each example's count: those of independent coins of probability q."""
    steps, count = member.shape
    rate = stats.binomtest(int(member.sum()), member.size, q).pvalue if q < 1 else float(member.all())
    sizes = _dispersion(member.sum(1), count, q)
    turns = _dispersion(member.sum(0), steps, q)
    variance = float(member.sum(1).var() / max(1e-30, count * q * (1 - q)))
    return [
        Check("inclusion rate", float(member.mean()), q, float(rate), "sampling rate is not the certified one"),
        Check("inclusion variance", variance, 1.0, min(1.0, 2 * min(sizes, turns)), "sampling is not Poisson"),
    ]


def _dispersion(counts: numpy.ndarray, trials: int, q: float) -> float:
    """Two-sided p-value of the sum of squared deviations of independent Binomial(trials, q) counts: by a gamma of its moments, of
    FEW counts, whose sum is too coarse for one, by DRAWS of it (from a stream of its own)."""
    variance = trials * q * (1 - q)
    if variance == 0:
        return 1.0
    statistic = ((counts - trials * q) ** 2).sum() / variance
    if len(counts) < FEW:
        drawn = numpy.random.default_rng(0).binomial(trials, q, (DRAWS, len(counts)))
        chance = ((drawn - trials * q) ** 2).sum(1) / variance
        low, high = (
            (1 + (side <= 0).sum()) / (1 + DRAWS) for side in (chance - statistic - 1e-9, statistic - chance - 1e-9)
        )
        return min(1.0, 2 * min(float(low), float(high)))
    excess = (1 - 6 * q * (1 - q)) / variance
    mean, spread = len(counts), len(counts) * (2 + excess)
    gamma = stats.gamma(mean**2 / spread, scale=spread / mean)
    return min(1.0, 2 * min(gamma.cdf(statistic), gamma.sf(statistic)))

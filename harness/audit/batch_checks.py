"""Checks of what canaries add to releases and of who is in which batch."""

from __future__ import annotations

import numpy
from scipy import stats

from dpft.harness.audit.alarms import Check
from dpft.harness.audit.observe import Observation
from dpft.harness.privacy.samplings import POISSON

FAR = "sensitivity exceeds the clip norm"
UNLIKE = "contributions are not the clipped gradients"
FEW, DRAWS = 20, 20_000


def checks(seen: Observation) -> list[Check]:
    """Those of contributions, and of the batches that the sampler drew."""
    return [*_contributions(seen), *_batches(seen)]


def _contributions(seen: Observation) -> list[Check]:
    """What the release holds along canaries of the batch, less what clipping leaves of their gradients, on average: of those far
    above the clip norm and of those near it; and along canaries that are absent."""
    off = seen.seen - seen.expected
    far, near, absent = seen.member & seen.far, seen.member & ~seen.far, ~seen.member
    variances = (seen.spread * (seen.noise_multiplier[:, None] / seen.lead) ** 2).sum(0)
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


def _batches(seen: Observation) -> list[Check]:
    """Rate of inclusion; variances of batch sizes and of each example's count, and how often an example is in two batches in a
    row: those of independent coins of probability q, tossed by those whose turn it is."""
    rows, sampling = seen.sampled, POISSON if seen.privacy is None else seen.privacy.sampling
    member, turn = seen.member[rows], seen.eligible[rows]
    q = seen.sampling_probability  # of an example, whosever it is
    if not sampling.poisson and sampling.together == 1:
        q = sampling.least_probability(q)
    tossed = member[turn]
    rate = stats.binomtest(int(tossed.sum()), tossed.size, q).pvalue if q < 1 else float(tossed.all())
    rate = 0.0 if (member & ~turn).any() else float(rate)
    cut = getattr(sampling, "truncated_batch_size", None)
    sizes = _dispersion(member.sum(1), turn.sum(1), seen.sampling_probability, cut)
    counts = _dispersion(member.sum(0), turn.sum(0), q)
    again = _in_a_row(seen.member, seen.eligible, rows, q, getattr(sampling, "groups", 1))
    variance = float(member.sum(1).var() / max(1e-30, turn.sum(1).mean() * q * (1 - q)))
    p = 0.0 if cut is not None and member.sum(1).max() > cut else min(1.0, 3 * min(sizes, counts, again))
    return [
        Check("inclusion rate", float(tossed.mean()), q, rate, "sampling rate is not the certified one"),
        Check("inclusion variance", variance, 1.0, p, "sampling is not Poisson"),
    ]


def _dispersion(counts: numpy.ndarray, trials: numpy.ndarray, q: float, cut: int | None = None) -> float:
    """Two-sided p-value of the sum of squared deviations of independent Binomial(trials, q) counts, in variances: by a gamma of
    its moments; of FEW counts, whose sum is too coarse for one, and of counts that were cut, by DRAWS of it (from a stream of
    its own)."""
    counts, trials = counts[trials > 0], trials[trials > 0]
    variance = trials * q * (1 - q)
    if len(counts) == 0 or q >= 1:
        return 1.0
    statistic = ((counts - trials * q) ** 2 / variance).sum()
    if len(counts) < FEW or cut is not None:
        each = int(trials[0]) if (trials == trials[0]).all() else trials  # of one number of trials it is much faster
        drawn = numpy.random.default_rng(0).binomial(each, q, (DRAWS, len(counts)))
        drawn = drawn if cut is None else numpy.minimum(drawn, cut)
        chance = ((drawn - trials * q) ** 2 / variance).sum(1)
        low, high = (
            (1 + (side <= 0).sum()) / (1 + DRAWS) for side in (chance - statistic - 1e-9, statistic - chance - 1e-9)
        )
        return min(1.0, 2 * min(float(low), float(high)))
    excess = (1 - 6 * q * (1 - q)) / variance
    mean, spread = len(counts), float((2 + excess).sum())
    gamma = stats.gamma(mean**2 / spread, scale=spread / mean)
    return min(1.0, 2 * min(gamma.cdf(statistic), gamma.sf(statistic)))


def _in_a_row(member: numpy.ndarray, turn: numpy.ndarray, rows: numpy.ndarray, q: float, lag: int) -> float:
    """Two-sided p-value of how often an example is in two batches, `lag` steps apart, of both of which it may be: by a gamma of
    the moments of that number. member, turn: [T, n]; rows: [T], the steps that count."""
    both = (turn & rows[:, None])[lag:] & (turn & rows[:, None])[:-lag]
    found, pairs = int((member[lag:] & member[:-lag] & both).sum()), int(both.sum())
    overlapping = int((both[lag:] & both[:-lag]).sum())  # pairs that share a step
    if not pairs or q >= 1:
        return 1.0
    mean, spread = pairs * q**2, pairs * q**2 * (1 - q**2) + 2 * overlapping * (q**3 - q**4)
    gamma = stats.gamma(mean**2 / spread, scale=spread / mean)
    return min(1.0, 2 * min(float(gamma.cdf(found + 0.5)), float(gamma.sf(max(0.0, found - 0.5)))))

"""Five kinds of checks with p-values of what a run showed: noise, contributions and batches, each against what was certified."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from scipy import stats

from dpft.harness.audit.observe import Observation

SAME = 0.2  # of the noise entries of a step: chance makes a few in a thousand equal in fp32
LEVEL = 0.01  # of all p-values together: a correct method alarms in at most one of a hundred audits


@dataclass(frozen=True)
class Check:
    """One statistic: its p-value if the run does what it was certified for, and what it means when that is tiny."""

    name: str
    observed: float
    expected: float
    p_value: float
    violation: str


def run_checks(seen: Observation) -> list[Check]:
    """All checks; an alarm is a p-value under LEVEL / number of checks (Bonferroni)."""
    return [
        *_noise(seen),
        _repetition(seen),
        _contribution(seen),
        *_batches(seen.member, seen.sampling_probability),
    ]


def alarms(checks: list[Check]) -> list[Check]:
    """Those whose p-value is too small for chance at the family's LEVEL."""
    return [check for check in checks if check.p_value < LEVEL / len(checks)]


def _noise(seen: Observation) -> list[Check]:
    """Size of the noise, by parameter (too small), from step to step (must be the same), and its shape."""
    squares, counts = seen.squares, seen.counts
    if (
        counts.sum() < 100
    ):  # an encoding spreads every gradient over all coordinates: directions of those who were absent
        absent = numpy.where(seen.member, 0.0, seen.seen / seen.noise_multiplier[:, None])
        squares, counts = (absent**2).sum(1, keepdims=True), (~seen.member).sum(1, keepdims=True)
        values = absent[~seen.member]
    else:
        values = seen.noise[seen.quiet]
    totals, sizes = squares.sum(0), counts.sum(0)
    tested = sizes > 0
    p_small = stats.chi2.cdf(totals[tested], sizes[tested])
    smallest = numpy.sqrt(totals[tested] / sizes[tested])
    by_step, width = squares.sum(1), counts.sum(1)
    filled = width > 0
    common = max(float(totals.sum() / sizes.sum()), 1e-30)  # whatever the size is, it must be that of every step
    z = stats.norm.ppf(numpy.clip(stats.chi2.cdf(by_step[filled] / common, width[filled]), 1e-300, 1 - 1e-16))
    spread = stats.chi2.sf((z**2).sum(), max(1, len(z) - 1))
    few = values[:: max(1, len(values) // 50_000)].astype(float)
    shape = stats.kstest(few / max(few.std(), 1e-30), "norm")
    worst = int(numpy.argmin(p_small))
    return [
        Check(
            "noise std", float(smallest[worst]), 1.0, min(1.0, float(p_small.min()) * len(p_small)), "noise too small"
        ),
        Check("noise by step", float(numpy.std(z)), 1.0, float(spread), "noise depends on the step or the batch"),
        Check("noise shape", float(shape.statistic), 0.0, float(shape.pvalue), "noise is not Gaussian"),
    ]


def _repetition(seen: Observation) -> Check:
    """Equal entries within a step; correlation of any two steps (uncentred, exact t distribution) and of neighbours pooled."""
    noise, quiet = seen.noise.astype(numpy.float64), seen.quiet.astype(numpy.float64)
    steps = len(noise)
    if steps < 2:
        return Check("noise repetition", 0.0, 0.0, 1.0, "noise is repeated")
    inner, own = noise @ noise.T, noise**2 @ quiet.T
    common = quiet @ quiet.T
    upper = numpy.triu_indices(steps, 1)
    sizes = common[upper]
    enough = (sizes > 16) & ((own * own.T)[upper] > 0)
    if not enough.any():
        return Check("noise repetition", 0.0, 0.0, 1.0, "noise is repeated")
    if seen.repeated > SAME:
        return Check("noise repetition", seen.repeated, 0.0, 0.0, "noise is repeated")
    r = numpy.clip(inner[upper][enough] / numpy.sqrt((own * own.T)[upper][enough]), -1 + 1e-12, 1 - 1e-12)
    t = numpy.abs(r) * numpy.sqrt(sizes[enough] - 1) / numpy.sqrt(1 - r**2)
    p_any = min(1.0, float((2 * stats.t.sf(t, sizes[enough] - 1)).min()) * len(t))
    lag = numpy.diagonal(inner, 1).sum() / numpy.sqrt(numpy.diagonal(common, 1).sum())
    p_lag = 2 * stats.norm.sf(abs(lag))
    largest = float(r[numpy.argmax(numpy.abs(r))])
    return Check("noise repetition", largest, 0.0, min(1.0, 2 * min(p_any, float(p_lag))), "noise is repeated")


def _contribution(seen: Observation) -> Check:
    """Mean of the release along the canaries of the batch that aim at all layers: at most the clip norm (one-sided)."""
    chosen = seen.member & (seen.places < 0)
    values = seen.seen[chosen]
    spread = (chosen * seen.noise_multiplier[:, None] ** 2).sum() ** 0.5
    if len(values) == 0:
        return Check("canary mean", 0.0, 1.0, 1.0, "sensitivity exceeds the clip norm")
    mean = float(values.mean())
    p = stats.norm.sf((mean - 1.0) * len(values) / spread)
    return Check("canary mean", mean, 1.0, float(p), "sensitivity exceeds the clip norm")


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
    """Two-sided p-value of the sum of squared deviations of independent Binomial(trials, q) counts, by a gamma of its moments."""
    variance = trials * q * (1 - q)
    if variance == 0:
        return 1.0
    excess = (1 - 6 * q * (1 - q)) / variance
    statistic = ((counts - trials * q) ** 2).sum() / variance
    mean, spread = len(counts), len(counts) * (2 + excess)
    gamma = stats.gamma(mean**2 / spread, scale=spread / mean)
    return min(1.0, 2 * min(gamma.cdf(statistic), gamma.sf(statistic)))

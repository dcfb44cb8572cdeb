"""Checks of noise: its size, shape and extremes, and whether any of it occurs twice."""

from __future__ import annotations

import numpy
from scipy import stats

from dpft.harness.audit.alarms import Check
from dpft.harness.audit.observe import Observation

ENOUGH = 16  # entries that two steps or parameters must have in common to be compared
REPEATED = "noise is repeated"


def checks(seen: Observation) -> list[Check]:
    """Those of size, of extremes, of the empty batch, and of repetition."""
    return [
        _size(seen),
        _by_step(seen),
        _shape(seen),
        _extremes(seen),
        _empty_batch(seen),
        _between_steps(seen),
        _between_parameters(seen),
        _coincidences(seen),
    ]


def _size(seen: Observation) -> Check:
    """Chi-square by parameter and phase: too small?"""
    noise = seen.noise
    totals = numpy.concatenate([noise.squares[seen.phases == phase].sum(0) for phase in numpy.unique(seen.phases)])
    sizes = numpy.concatenate([noise.counts[seen.phases == phase].sum(0) for phase in numpy.unique(seen.phases)])
    tested = sizes > 0
    p = stats.chi2.cdf(totals[tested], sizes[tested])
    worst = int(numpy.argmin(p))
    smallest = float(numpy.sqrt(totals[tested] / sizes[tested])[worst])
    return Check("noise std", smallest, 1.0, min(1.0, float(p.min()) * len(p)), "noise too small")


def _by_step(seen: Observation) -> Check:
    """Whatever the size is, it must be that of every step: the spread of the steps' chi-squares, as normal quantiles."""
    squares, width = seen.noise.squares.sum(1), seen.noise.counts.sum(1)
    filled = width > 0
    common = max(float(squares.sum() / width.sum()), 1e-30)
    z = stats.norm.ppf(numpy.clip(stats.chi2.cdf(squares[filled] / common, width[filled]), 1e-300, 1 - 1e-16))
    p = stats.chi2.sf((z**2).sum(), max(1, len(z) - 1))
    return Check("noise by step", float(numpy.std(z)), 1.0, float(p), "noise depends on the step or the batch")


def _shape(seen: Observation) -> Check:
    """Kolmogorov-Smirnov of up to 50,000 entries, in their own standard deviations."""
    values = seen.noise.kept[seen.noise.quiet]
    few = values[:: max(1, len(values) // 50_000)].astype(float)
    found = stats.kstest(few / max(few.std(), 1e-30), "norm")
    return Check("noise shape", float(found.statistic), 0.0, float(found.pvalue), "noise is not Gaussian")


def _extremes(seen: Observation) -> Check:
    """The largest magnitude of all n entries, in their own standard deviations: P(largest <= x) = (2 Phi(x) - 1)^n, two-sided.

    It sees a tail that is cut at c sigma once n erfc(c / sqrt 2) is about 8: 3 sigma with 3,600 entries, 4 with 150,000, 5 with
    14 million, 5.77 with a thousand million.
    """
    draws = int(seen.noise.counts.sum())
    largest = float(seen.noise.largest.max()) / max(1e-30, float(seen.noise.squares.sum() / draws) ** 0.5)
    beyond = 2 * stats.norm.sf(largest)
    below = float(numpy.exp(draws * numpy.log1p(-min(beyond, 1 - 1e-16))))
    above = float(-numpy.expm1(draws * numpy.log1p(-min(beyond, 1 - 1e-16))))
    expected = float(stats.norm.isf(-numpy.expm1(numpy.log(0.5) / draws) / 2))  # the median of the law
    return Check(
        "noise extremes", largest, expected, min(1.0, 2 * min(below, above)), "noise has not the tail of a Gaussian"
    )


def _empty_batch(seen: Observation) -> Check:
    """The step whose batch was empty against all others (F): too small?"""
    violation = "an empty batch is released without its noise"
    if seen.empty is None:
        return Check("noise of no batch", 1.0, 1.0, 1.0, violation)
    others = numpy.arange(seen.steps) != seen.empty
    (total, size), (rest, many) = (
        (float(seen.noise.squares[rows].sum()), int(seen.noise.counts[rows].sum())) for rows in (~others, others)
    )
    ratio = total / size / max(1e-30, rest / many)
    return Check("noise of no batch", ratio**0.5, 1.0, float(stats.f.cdf(ratio, size, many)), violation)


def _between_steps(seen: Observation) -> Check:
    """Correlation of any two steps, over all that is kept and by parameter (uncentred, exact t), and of neighbours pooled."""
    kept, quiet = seen.noise.kept.astype(float), seen.noise.quiet.astype(float)
    if len(kept) < 2:
        return Check("noise of two steps", 0.0, 0.0, 1.0, REPEATED)
    found = [_any_two(kept[:, part], quiet[:, part]) for part in (slice(None), *seen.noise.columns.values())]
    tested = sum(number for _, _, number in found)
    if not tested:
        return Check("noise of two steps", 0.0, 0.0, 1.0, REPEATED)
    p_any, largest, _ = min(found)
    inner, common = (kept[1:] * kept[:-1]).sum(), (quiet[1:] * quiet[:-1]).sum()
    scale = max(float((kept**2).sum() / max(1.0, quiet.sum())), 1e-30)
    p_lag = 2 * stats.norm.sf(abs(inner) / scale / max(1.0, common) ** 0.5)
    return Check("noise of two steps", largest, 0.0, min(1.0, 2 * min(tested * p_any, float(p_lag))), REPEATED)


def _any_two(kept: numpy.ndarray, quiet: numpy.ndarray) -> tuple[float, float, int]:
    """(smallest p-value, its correlation, pairs of steps) of [steps, entries]."""
    upper = numpy.triu_indices(len(kept), 1)
    return _smallest(
        (kept @ kept.T)[upper], *((kept**2 @ quiet.T)[i] for i in (upper, upper[::-1])), (quiet @ quiet.T)[upper]
    )


def _between_parameters(seen: Observation) -> Check:
    """Correlation of any two parameters, entry by entry as far as both go, over all steps."""
    noise, upper = seen.noise, numpy.triu_indices(len(seen.noise.inner), 1)
    p, r, tested = _smallest(noise.inner[upper], noise.own[upper], noise.own[upper[::-1]], noise.common[upper])
    return Check("noise of two parameters", r, 0.0, min(1.0, p * max(1, tested)), REPEATED)


def _smallest(
    inner: numpy.ndarray, own: numpy.ndarray, other: numpy.ndarray, common: numpy.ndarray
) -> tuple[float, float, int]:
    """(smallest p-value, its correlation, number) of pairs with ENOUGH in common: t of an uncentred correlation.

    inner, own, other, common: by pair, sums of products, of either's squares, and of entries.
    """
    enough = (common > ENOUGH) & (own > 0) & (other > 0)
    if not enough.any():
        return 1.0, 0.0, 0
    n = common[enough]
    r = numpy.clip(inner[enough] / numpy.sqrt(own[enough] * other[enough]), -1 + 1e-12, 1 - 1e-12)
    p = 2 * stats.t.sf(numpy.abs(r) * numpy.sqrt((n - 1) / (1 - r**2)), n - 1)
    least = int(numpy.argmin(p))
    return float(p[least]), float(r[least]), len(p)


def _coincidences(seen: Observation) -> Check:
    """Pairs of entries of one step that are equal but for rounding, wherever they stand: more than independent draws have?"""
    found, expected, variance = seen.noise.close.sum(0)
    if not expected:
        return Check("noise twice in a step", 1.0, 1.0, 1.0, REPEATED)
    few = expected < 50  # where a normal law is too light on the right
    p = stats.poisson.sf(found - 1, expected) if few else stats.norm.sf((found - 0.5 - expected) / variance**0.5)
    return Check("noise twice in a step", found / expected, 1.0, float(p), REPEATED)

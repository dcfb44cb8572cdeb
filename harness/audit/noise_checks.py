"""Checks of noise: its size, shape and extremes, and whether any of it occurs twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
from scipy import stats

from dpft.harness.audit.alarms import Check
from dpft.harness.audit.observe import Observation

ENOUGH = 2  # two steps or parameters with more entries in common are compared
REPEATED = "noise is repeated"


def checks(seen: Observation, redrawn: Mapping[Any, numpy.ndarray]) -> list[Check]:
    """Those of size, of extremes, of the empty batch, of repetition, and of where noise comes from.

    redrawn: by part, how the noise of the run goes with noise of another key (replayed.Redrawn).
    """
    return [
        _size(seen),
        _by_step(seen),
        _shape(seen),
        _extremes(seen),
        _empty_batch(seen),
        _between_steps(seen),
        _between_parameters(seen),
        _coincidences(seen),
        _another_key(redrawn),
    ]


def _size(seen: Observation) -> Check:
    """Chi-square by part and phase, and by release: too small?"""
    noise, tested = seen.noise, []
    for phase in numpy.unique(seen.phases):
        own = seen.phases == phase
        tested += zip(noise.squares[own].sum(0), noise.counts[own].sum(0), strict=True)
    if len(noise.releases) > 1:
        tested += [(noise.squares[:, own].sum(), noise.counts[:, own].sum()) for own in noise.releases.values()]
    totals, sizes = numpy.array([(total, size) for total, size in tested if size > 0]).T
    p = stats.chi2.cdf(totals, sizes)
    worst = int(numpy.argmin(p))
    smallest = float(numpy.sqrt(totals / sizes)[worst])
    return Check("noise std", smallest, 1.0, min(1.0, float(p.min()) * len(p)), "noise too small")


def _by_step(seen: Observation) -> Check:
    """Whatever the size is, it must be that of every step: the spread of the chi-squares by release, as normal quantiles."""
    noise = seen.noise
    found = [_spread(noise.squares[:, own].sum(1), noise.counts[:, own].sum(1)) for own in noise.releases.values()]
    p, observed = min(found)
    return Check("noise by step", observed, 1.0, min(1.0, p * len(found)), "noise depends on the step or the batch")


def _spread(squares: numpy.ndarray, width: numpy.ndarray) -> tuple[float, float]:
    """(p-value, standard deviation of the steps' normal quantiles)."""
    filled = width > 0
    if filled.sum() < 2:
        return 1.0, 1.0
    common = max(float(squares.sum() / width.sum()), 1e-30)
    z = stats.norm.ppf(numpy.clip(stats.chi2.cdf(squares[filled] / common, width[filled]), 1e-300, 1 - 1e-16))
    return float(stats.chi2.sf((z**2).sum(), max(1, len(z) - 1))), float(numpy.std(z))


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
    """The step whose batch was empty against all others (F), by release: too small?"""
    violation, noise = "an empty batch is released without its noise", seen.noise
    if seen.empty is None:
        return Check("noise of no batch", 1.0, 1.0, 1.0, violation)
    others, found = numpy.arange(seen.steps) != seen.empty, []
    for own in noise.releases.values():
        (total, size), (rest, many) = (
            (float(noise.squares[rows][:, own].sum()), int(noise.counts[rows][:, own].sum()))
            for rows in (~others, others)
        )
        if size and many:
            ratio = total / size / max(1e-30, rest / many)
            found.append((float(stats.f.cdf(ratio, size, many)), ratio**0.5))
    p, observed = min(found, default=(1.0, 1.0))
    return Check("noise of no batch", observed, 1.0, min(1.0, p * max(1, len(found))), violation)


def _between_steps(seen: Observation) -> Check:
    """Correlation of any two steps, over all that is kept and by part (uncentred, exact t), and of neighbours pooled."""
    kept, quiet = seen.noise.kept.astype(float), seen.noise.quiet.astype(float)
    if len(kept) < 2:
        return Check("noise of two steps", 0.0, 0.0, 1.0, REPEATED)
    parts = [slice(None), *seen.noise.columns.values()]
    found = [_any_two(kept[:, part], quiet[:, part]) for part in parts]
    p_any, largest, _ = min(found)
    tested = sum(number for _, _, number in found)
    p_lag, lag, pooled = _smallest(*numpy.array([_neighbours(kept[:, part], quiet[:, part]) for part in parts]).T)
    p, r = min((max(1, tested) * p_any, largest), (max(1, pooled) * p_lag, lag))
    return Check("noise of two steps", r, 0.0, min(1.0, 2 * p), REPEATED)


def _neighbours(kept: numpy.ndarray, quiet: numpy.ndarray) -> tuple[float, float, float, float]:
    """What `_smallest` asks of one pair: each step and the next, pooled; [steps, entries]."""
    both = quiet[1:] * quiet[:-1]
    parts = kept[1:] * kept[:-1], kept[1:] ** 2 * both, kept[:-1] ** 2 * both, both
    return tuple(float(part.sum()) for part in parts)


def _any_two(kept: numpy.ndarray, quiet: numpy.ndarray) -> tuple[float, float, int]:
    """(smallest p-value, its correlation, pairs of steps) of [steps, entries]."""
    upper = numpy.triu_indices(len(kept), 1)
    return _smallest(
        (kept @ kept.T)[upper], *((kept**2 @ quiet.T)[i] for i in (upper, upper[::-1])), (quiet @ quiet.T)[upper]
    )


def _between_parameters(seen: Observation) -> Check:
    """Correlation of any two parts, entry by entry as far as both go, over all steps."""
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


def _another_key(redrawn: Mapping[Any, numpy.ndarray]) -> Check:
    """Correlation, by part, of the run's noise with what its mechanism drew in the same place under another key: none, unless
    noise comes from somewhere else, a seed that is public for one."""
    violation = "noise is not drawn from its own key"
    if not redrawn:
        return Check("noise of another key", 0.0, 0.0, 1.0, violation)
    p, r, tested = _smallest(*numpy.array(list(redrawn.values())).T)
    return Check("noise of another key", r, 0.0, min(1.0, p * max(1, tested)), violation)

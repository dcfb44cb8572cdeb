"""A second accountant for noise of random scale: distribution functions of the loss, composed by our own FFT.

It shares with harness/privacy/mixtures.py the rounded scales and nothing else: no hockey-stick divergences, no library. It
rounds losses to the nearest cell, so it is an estimate and no bound.
"""

from __future__ import annotations

import math
from typing import Any

from dpft.harness.privacy.mixtures import Kinds, atoms_of

MAX_CELLS = 2**22
ZERO, ONE = -39.0, 8.5  # where a normal distribution function is 0 and 1 in double precision
WIDTHS = 30.0  # the window holds this many standard deviations of the composed loss on either side of its mean


def epsilon_by_fft(kinds: Kinds, delta: float, target: float, eps_error: float) -> float | None:
    """Epsilon of a composition at delta, the larger of the two directions; None where its grid would be too large."""
    steps = sum(count for _, _, count in kinds)
    interval = eps_error / math.sqrt(steps)
    found = [_direction(kinds, delta, interval, target, remove) for remove in (True, False)]
    return None if None in found else max(found)


def _direction(kinds: Kinds, delta: float, interval: float, target: float, remove: bool) -> float | None:
    import numpy
    from scipy.fft import irfft, rfft

    pmfs = [_pmf(q, atoms_of(mechanism), interval, remove) for q, mechanism, _ in kinds]
    if any(pmf is None for pmf in pmfs):
        return None
    mean = variance = lost = 0.0
    for (mass, half), (_, _, count) in zip(pmfs, kinds, strict=True):
        loss = interval * numpy.arange(-half, half + 1)
        average = float(mass @ loss)
        mean, variance = mean + count * average, variance + count * float(mass @ loss**2 - average**2)
        lost += count * max(0.0, 1 - float(mass.sum()))
    reach = abs(mean) + WIDTHS * math.sqrt(variance) + 3 * target + 2 * interval * max(half for _, half in pmfs)
    cells = 1 << math.ceil(math.log2(2 * reach / interval))
    if cells > MAX_CELLS:
        return None
    product = 1.0
    for (mass, half), (_, _, count) in zip(pmfs, kinds, strict=True):
        wrapped = numpy.zeros(cells)
        wrapped[: half + 1], wrapped[-half:] = mass[half:], mass[:half]
        product = product * rfft(wrapped) ** count
    total = numpy.maximum(irfft(product, n=cells)[1 : cells // 2], 0.0)  # losses above 0
    loss = interval * numpy.arange(1, cells // 2)
    above = numpy.cumsum(total[::-1])[::-1] + lost
    weighted = numpy.cumsum((total * numpy.exp(-loss))[::-1])[::-1]
    index = int(numpy.searchsorted(numpy.exp(loss) * weighted - above, -delta))
    if index in (0, len(loss)) or above[index] <= delta:
        return 0.0 if index == 0 else None
    return max(0.0, math.log((above[index] - delta) / weighted[index]))


def _pmf(q: float, atoms: tuple[Any, Any, float], interval: float, remove: bool) -> tuple[Any, int] | None:
    """(probabilities of the losses -half..half times the interval, half) of one step under its own first distribution."""
    import numpy
    from scipy.special import ndtr

    sigmas, masses, _ = atoms

    def cdf(loss: Any) -> Any:
        with numpy.errstate(divide="ignore", invalid="ignore"):
            ratio = (numpy.expm1(loss if remove else -loss) + q) / q  # the likelihood ratio of one unsampled step
            base = numpy.where(ratio > 0, numpy.log(numpy.maximum(ratio, 1e-300)), -numpy.inf)
        total, sign = numpy.zeros(len(loss)), 1 if remove else -1
        ends = (numpy.array([[ZERO], [ONE]]) * sign - 0.5 / sigmas + remove * numpy.array([[0], [1]]) / sigmas) / sigmas
        first, last = numpy.searchsorted(sign * base, sign * ends)  # sign * base is sorted
        for sigma, mass, start, stop in zip(sigmas, masses, first, last, strict=True):
            # the noisy value, in standard deviations from the example's absence
            at = base[start:stop] * sigma + 0.5 / sigma
            if remove:
                total[start:stop] += mass * ((1 - q) * ndtr(at) + q * ndtr(at - 1 / sigma))
                total[stop:] += mass * ((1 - q) + q)
            else:
                total[start:stop] += mass * ndtr(-at)
                total[stop:] += mass
        return total

    half = 64
    while 1 - cdf(numpy.array([half * interval]))[0] > 1e-14 or cdf(numpy.array([-half * interval]))[0] > 1e-14:
        half *= 2
        if half * interval > 60:
            break
    if half > MAX_CELLS // 8:
        return None
    mass = numpy.diff(cdf(interval * (numpy.arange(-half, half + 2) - 0.5)))
    return numpy.maximum(mass, 0.0), half

"""Epsilon after every step of a plan: a known curve, never below the truth."""

import functools
import math
from bisect import bisect_left
from itertools import accumulate
from typing import Any

from dpft.harness.cache import cached
from dpft.harness.privacy.accountant import (
    build_accountant,
    check_numbers,
    evaluate,
    guarded,
    library_version,
    tolerance,
)

MAX_POINTS, MIN_POINTS = 200, 16
WORK = 2e7  # cells times points: a few seconds


def epsilon_curve(sigma: float, sampling_probability: float, steps: int, delta: float, target: float) -> list[float]:
    """Upper epsilon after 0, 1, ..., `steps` steps (length steps + 1); nondecreasing; the last is `epsilon`'s upper.

    Computed at no more than 200 step counts, `steps` among them, and elsewhere filled with the next larger one, so that
    no value is below the truth. Cached on disk. Raises CannotRun as `epsilon` does.
    """
    kind = (float(sampling_probability), float(sigma), steps)
    delta, target = float(delta), float(target)
    if steps == 0:
        return [0.0]
    check_numbers((kind,), delta, target)
    points = _kept(kind, delta, target)
    counts = [count for count, _ in points]
    return [0.0] + [points[bisect_left(counts, step)][1] for step in range(1, steps + 1)]


@functools.lru_cache(maxsize=512)  # thousands of runs may have one plan
def _kept(kind: tuple[float, float, int], delta: float, target: float) -> list[list[Any]]:
    """As `_points`, from disk where they were computed before."""
    inputs = {"target": target, "delta": delta, "q": kind[0], "sigma": kind[1], "steps": int(kind[2])}

    def valid(points: Any) -> bool:
        return isinstance(points, list) and points[-1:] != [] and points[-1][0] == kind[2]

    return cached("curve", {**inputs, "prv_accountant": library_version()}, valid, lambda: _points(kind, delta, target))


def _points(kind: tuple[float, float, int], delta: float, target: float) -> list[list[Any]]:
    """[steps taken, upper epsilon] at growing step counts, the last being the whole plan's."""
    with guarded((kind,), delta):
        accountant = build_accountant((kind,), delta, target)
        last = evaluate(accountant, (kind,), delta)[2]
        after = _Composed(accountant.composer.self_composers[0], delta, target)
        counts = _counts(kind[2], WORK / after.cells)
        # rounding grows with the step count, so the difference at the last one bounds it for all
        rounding = abs(after.upper(kind[2]) - last)
        if rounding < after.eps_error / 20:
            uppers = [after.upper(count) + 2 * rounding for count in counts[:-1]]
        else:  # delta is too small for double precision
            counts = _counts(kind[2], WORK / after.cells / 10)
            uppers = [max(0.0, accountant.compute_epsilon(delta, [count])[2]) for count in counts[:-1]]
    # epsilon grows with the steps, so any later upper bound is one for now: the smallest makes the curve monotone
    bounds = list(accumulate(reversed([*uppers, last]), min))
    return [[count, bound] for count, bound in zip(counts, reversed(bounds), strict=True)]


def _counts(steps: int, affordable: float) -> list[int]:
    """The step counts to compute, dense at the start: epsilon grows like the square root of the steps."""
    points = int(min(MAX_POINTS, max(MIN_POINTS, affordable)))
    if steps <= points:
        return list(range(1, steps + 1))
    return sorted({math.ceil(steps * (index / points) ** 2) for index in range(1, points + 1)} | {steps})


class _Composed:
    """A plan's accountant asked for many step counts, in double precision: ten times faster than the library's own."""

    def __init__(self, composer: Any, delta: float, target: float) -> None:
        import numpy

        self.eps_error, delta_error = tolerance(target, delta)
        self.delta = delta - delta_error
        self.domain = composer.domain
        self.cells = len(composer.domain)
        self.log_modulus = numpy.log(numpy.maximum(numpy.abs(composer.F), 1e-300)).astype(numpy.float64)
        self.phase = numpy.angle(composer.F)  # long double: multiplied by the step count before it is reduced

    def upper(self, count: int) -> float:
        """Upper epsilon after `count` >= 1 steps, as DiscretePrivacyRandomVariable.compute_epsilon defines it."""
        import numpy
        from scipy.fft import irfft

        angle = numpy.remainder(count * self.phase, 2 * numpy.longdouble(numpy.pi)).astype(numpy.float64)
        mass = irfft(numpy.exp(count * self.log_modulus) * (numpy.cos(angle) + 1j * numpy.sin(angle)), n=self.cells)
        mass = numpy.roll(mass, count - 1 + (self.cells // 2 if count % 2 == 0 else 0))
        step, start = float(self.domain.dt()), float(self.domain.t_min()) + float(self.domain.shifts()) * (count - 1)
        first = max(0, math.ceil(-start / step))  # only non-negative losses matter to a non-negative epsilon
        loss = start + step * numpy.arange(first, self.cells)
        mass = mass[first:]
        above = numpy.flip(numpy.cumsum(numpy.flip(mass)))
        weighted = numpy.flip(numpy.cumsum(numpy.flip(mass * numpy.exp(-loss))))
        index = int(numpy.searchsorted(numpy.exp(loss) * weighted - above, -self.delta))
        if index == 0:
            return self.eps_error  # epsilon 0 already spends less than delta
        return max(0.0, math.log((above[index] - self.delta) / weighted[index])) + self.eps_error

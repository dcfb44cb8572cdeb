"""Epsilon of noise whose scale is random and independent of data: privacy loss distributions, both directions.

Revealing the scale can only hurt, so one step's hockey-stick divergence is at most delta(eps) = E_S[delta_S(eps)], the mean
over the scales of the Gaussian's (Balle & Wang, 1805.06530). Scales are rounded down to finitely many, and mass that is
lost at the end of the range counts as delta. Poisson subsampling is then exact, in the direction of adding and in that of
removing an example; Connect-the-Dots (2207.04380, dp-accounting) makes a pessimistic distribution of each, and these are
composed. Everything is rounded towards more privacy loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.privacy.scale_law import ScaleLaw, Term, parse

# (sampling probability, mechanism, steps); a mechanism is (law of u, dimension), or ("", sigma) for a Gaussian
Kinds = tuple[tuple[float, tuple[str, float], int], ...]

ATOMS = 600  # scales after rounding
EDGE = 33.0  # quantiles from expit(-33) = 5e-15 to expit(33)
TABLE = 3000  # points of one step's delta(eps); chords between them are above it, because it is convex in exp(eps)
MAX_CELLS = 2_000_000
ZERO = 1e-18


@functools.lru_cache(maxsize=64)  # a search asks for each law twice: for epsilon and for what the tail lacks
def scales(law: ScaleLaw, dimension: int) -> tuple[Any, Any, float]:
    """(S, probability, lost): the scales of spherical noise in units of C, rounded down, and the mass rounded down to 0.

    S = sqrt(2 G) / u with G ~ Gamma((d+1)/2): u is rounded up term by term, G down, by quantiles.
    """
    import numpy

    if all(term.kind == "constant" for term in law.terms):
        values, masses, lost = numpy.array([-math.log(law.mean)]), numpy.ones(1), 0.0
    else:
        values, masses, lost = _upper(law.terms[0])
        for term in law.terms[1:]:
            other, weight, more = _upper(term)
            values, masses = _merge((values[:, None] + other).ravel(), numpy.outer(masses, weight).ravel(), up=True)
            lost += more
        values = -numpy.log(values)
    low, _, mass, end = _quantiles("gamma", ((dimension + 1) / 2, 1.0))
    total = values[:, None] + 0.5 * numpy.log(2 * low)
    values, masses = _merge(total.ravel(), numpy.outer(masses, mass).ravel(), up=False)
    return numpy.exp(values), masses, lost + end


def _upper(term: Term) -> tuple[Any, Any, float]:
    """(values, probability, lost) of one term, rounded up; the mass above the last value is lost."""
    import numpy

    if term.kind == "constant":
        return numpy.array([term.weight * term.values[0]]), numpy.ones(1), 0.0
    _, high, mass, end = _quantiles(term.kind, term.values)
    return term.weight * high, mass, end


@functools.lru_cache(maxsize=64)
def _quantiles(kind: str, values: tuple[float, ...]) -> tuple[Any, Any, Any, float]:
    """(lower edges, upper edges, probabilities) of intervals that hold all but `lost` of a law, dense in both tails."""
    import numpy
    from scipy import special

    odds = numpy.linspace(-EDGE, EDGE, ATOMS + 1)
    below, above = special.expit(odds), special.expit(-odds)  # each exact where it is small
    if kind == "gamma":
        shape, scale = values
        edges = scale * numpy.where(odds < 0, special.gammaincinv(shape, below), special.gammainccinv(shape, above))
    elif kind == "exponential":
        edges = numpy.where(odds < 0, -numpy.log1p(-below), -numpy.log(above)) / values[0]
    else:
        edges = values[0] + (values[1] - values[0]) * below
        edges[-1] = values[1]
    # a quantile function is good to some 1e-12, which rounding outwards covers
    low, high = edges[:-1] * (1 - 1e-9), edges[1:] * (1 + 1e-9)
    mass = numpy.where(odds[1:] < 0, numpy.diff(below), -numpy.diff(above))
    return low, high, mass, 2 * float(below[0]) + 1e-15


def _merge(values: Any, masses: Any, up: bool) -> tuple[Any, Any]:
    """At most ATOMS values: neighbours are joined at the largest (`up`) or smallest of them, finely in both tails."""
    import numpy
    from scipy import special

    order = numpy.argsort(values)
    values, masses = values[order], masses[order]
    if len(values) > ATOMS:
        below = numpy.cumsum(masses)
        above = numpy.cumsum(masses[::-1])[::-1]
        odds = numpy.where(
            below < 0.5, special.logit(numpy.clip(below, 1e-15, 0.5)), -special.logit(numpy.clip(above, 1e-15, 0.5))
        )
        group = numpy.floor((odds + 35) / 70 * ATOMS).astype(int)
        first = numpy.flatnonzero(numpy.diff(group, prepend=-1))
        masses = numpy.add.reduceat(masses, first)
        last = numpy.append(first[1:], len(values)) - 1
        values = values[last] if up else values[first]
    return values, masses


def base_delta(sigmas: Any, masses: Any, lost: float) -> Callable[[Any], Any]:
    """gamma -> an upper bound on the hockey-stick divergence of one unsampled step, for gamma > 0 (either direction)."""
    import numpy
    from scipy.special import log_ndtr, ndtr

    mu = 1 / sigmas

    def exact(eps: Any) -> Any:
        total = numpy.zeros(len(eps))
        for part in numpy.array_split(numpy.arange(len(mu)), max(1, len(mu) // 100)):  # a little memory at a time
            m = mu[part][:, None]
            gap = ndtr(m / 2 - eps / m) - numpy.exp(numpy.minimum(eps + log_ndtr(-m / 2 - eps / m), 0.0))
            total += masses[part] @ numpy.clip(gap, 0.0, 1.0)
        return total

    high = 1.0
    while exact(numpy.array([high]))[0] > ZERO and high < 600:
        high *= 1.3
    eps = high * numpy.linspace(0, 1, TABLE) ** 2
    points, deltas = numpy.exp(eps), numpy.minimum.accumulate(exact(eps)) + lost + 1e-15

    def bound(gamma: Any) -> Any:
        gamma = numpy.asarray(gamma, dtype=float)
        inner = numpy.interp(numpy.maximum(gamma, 1.0), points, deltas)  # beyond the last point: the last delta
        with numpy.errstate(divide="ignore", over="ignore"):
            # H_gamma(P, Q) = 1 - gamma + gamma H_{1/gamma}(Q, P), and the pair is symmetric
            outer = 1 - gamma + gamma * numpy.interp(1 / numpy.minimum(gamma, 1.0), points, deltas)
        return numpy.clip(numpy.where(gamma >= 1, inner, outer), 0.0, 1.0)

    return bound


def sampled_delta(base: Callable[[Any], Any], q: float, remove: bool) -> Callable[[Any], Any]:
    """eps -> divergence of the Poisson-sampled step: (1-q) P + q P' against P (`remove`), or the other way round."""
    import numpy

    def removed(eps: Any) -> Any:
        gamma = numpy.exp(eps)
        inner = (gamma - 1 + q) / q
        return numpy.where(inner > 0, q * base(numpy.maximum(inner, 1e-300)), 1 - gamma)

    def added(eps: Any) -> Any:
        gamma = numpy.exp(eps)
        rest = 1 - gamma * (1 - q)
        safe = numpy.where(rest > 0, rest, 1.0)
        return numpy.where(rest > 0, safe * base(gamma * q / safe), 0.0)

    return removed if remove else added


@functools.lru_cache(maxsize=64)
def atoms_of(mechanism: tuple[str, float]) -> tuple[Any, Any, float]:
    import numpy

    text, number = mechanism
    if not text:
        return numpy.array([number]), numpy.ones(1), 0.0
    return scales(parse(text), int(number))


def distributions(kinds: Kinds, delta: float, eps_error: float) -> list[tuple[Any, Any]]:
    """(remove, add) one-step pessimistic loss distributions of each kind, on one grid. Raises CannotRun beyond MAX_CELLS."""
    steps = sum(count for _, _, count in kinds)
    width, found = interval(eps_error, steps), []
    for q, mechanism, _ in kinds:
        atoms = atoms_of(mechanism)
        base, tail = base_delta(*atoms), 1e-3 * delta / steps + 2 * q * atoms[2] + 4e-15
        found.append(tuple(distribution(sampled_delta(base, q, remove), width, tail) for remove in (True, False)))
    return found


def interval(eps_error: float, steps: int) -> float:
    """The cells of a grid on which `steps` steps err by a tenth of `eps_error` or less: the error grows like its square."""
    return min(eps_error / 10, 2 * eps_error / math.sqrt(steps))


def distribution(divergence: Callable[[Any], Any], interval: float, tail: float) -> Any:
    """Pessimistic loss distribution of one step, from its hockey-stick divergence as a function of eps [n]."""
    import numpy
    from dp_accounting.pld import pld_pmf

    def reach(rest: Callable[[float], float]) -> int:
        cells = 64
        while rest(cells * interval) > tail:
            cells *= 2
            if cells * interval > 200 or cells > MAX_CELLS:
                raise CannotRun(
                    "Cannot certify this noise: too much of one step's privacy loss is large; decrease epsilon or T."
                )
        return cells

    def at(eps: float) -> float:
        return float(divergence(numpy.array([eps]))[0])

    high = reach(at)
    low = reach(lambda eps: at(-eps) + math.expm1(-eps))  # what lies below -eps is moved up to it
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        interval, -low, high, divergence(numpy.arange(-low, high + 1) * interval)
    )


def composed_epsilon(parts: list[tuple[Any, Any]], counts: list[int], delta: float) -> float:
    """Epsilon at delta of `counts[i]` steps of each kind: the larger of the two directions."""
    worst = 0.0
    for direction in (0, 1):
        total = None
        for part, count in zip(parts, counts, strict=True):
            pmf = part[direction].self_compose(count, delta * 1e-7)
            total = pmf if total is None else total.compose(pmf, delta * 1e-7)
        worst = max(worst, float(total.get_epsilon_for_delta(delta)))
    return worst

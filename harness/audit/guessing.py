"""From the number of right guesses about who was in the data to a lower bound on epsilon, in one run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy
from scipy import stats

from dpft.harness.errors import CannotRun
from dpft.harness.privacy.accountant import MIN_SIGMA, guarded, prv_epsilon

MAX_GUESSED = 30.0  # no search goes beyond this epsilon


def p_value(epsilon: float, delta: float, canaries: int, guesses: int, right: int) -> float:
    """An upper bound on the probability that an (epsilon, delta)-DP training allows `right` or more of `guesses` right guesses.

    canaries: m, each in the data with probability 1/2, guessed or not. Steinke, Nasr & Jagielski (2305.08846), Theorem 3.1.
    """
    single = 1 / (1 + math.exp(-epsilon))
    mass = stats.binom.pmf(numpy.arange(right - 1, -1, -1), guesses, single)  # one, two, ... fewer than `right`
    slack = float((numpy.cumsum(mass) / numpy.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, float(stats.binom.sf(right - 1, guesses, single)) + 2 * canaries * delta * max(0.0, slack))


def by_guesses(delta: float, canaries: int, guesses: int, right: int, wrong: float = 0.05) -> float:
    """The largest epsilon at which `right` of `guesses` has a p-value of at most `wrong` (2305.08846, Appendix D)."""
    if p_value(0.0, delta, canaries, guesses, right) > wrong:
        return 0.0
    low, high = 0.0, MAX_GUESSED
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, delta, canaries, guesses, right) <= wrong else (low, middle)
    return low


def ceiling(delta: float, canaries: int, wrong: float = 0.05) -> float:
    """The most that `by_guesses` can say with that many canaries: all guessed, all right."""
    return by_guesses(delta, canaries, canaries, canaries, wrong)


def refuted(inverse: Callable[[float], float], canaries: int, guesses: int, right: int, wrong: float = 0.05) -> bool:
    """Whether a training with a trade-off function would show so many right guesses with a probability under `wrong`.

    inverse: y -> the least probability that an event has under one neighbour when it has y under the other. Mahloujifar,
    Melis & Chaudhuri (2410.22235), Algorithm 3: r[i] and h[i] bound the mass of more than i right guesses on a right and on
    a wrong guess; they are followed from i = right down to 0, where they must not be more than all the guesses.
    """
    if right == 0:
        return False
    r, h = wrong * right / canaries, wrong * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        new = max(h, inverse(min(1.0, r)))
        r += i / (guesses - i) * (new - h)
        h = new
    return r + h > guesses / canaries


def by_tradeoff(
    q: float, sigma: float, steps: int, delta: float, target: float, canaries: int, guesses: int, right: int,
    wrong: float = 0.05,
) -> float:  # fmt: skip
    """The epsilon at delta of the noisiest training of this q and T that the guesses do not refute, 0 when all are possible.

    Trainings with other noise multipliers are the family of hypotheses; sigma: the certified one.
    """

    def possible(tried: float) -> bool:
        return not refuted(functools.partial(inverse_tradeoff, q, tried, steps), canaries, guesses, right, wrong)

    low, high = sigma, sigma
    while possible(high):  # more noise until the guesses say no
        low, high = high, high * 1.5
        if high > 50 * sigma:
            return 0.0
    if low == high:
        while not possible(low):  # the certified training itself is refuted: less noise until one is possible
            high, low = low, low / 1.25
            if low < MIN_SIGMA:
                break
    while high > low * 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if possible(middle) else (low, middle)
    # `high` is refuted: its epsilon, and so that of any training with more noise, is too small
    try:
        return prv_epsilon(((q, high, steps),), delta, target)[0]
    except CannotRun:
        return target if high < sigma else 0.0


def inverse_tradeoff(q: float, sigma: float, steps: int, y: float) -> float:
    """The least probability of an event under one neighbour when it has y under the other: T Poisson-sampled Gaussian steps.

    From the privacy profile delta(epsilon), the larger of both directions: max over epsilon of (y - delta) e^-epsilon and of
    1 - delta - e^epsilon (1 - y).
    """
    epsilons, deltas = _profile(q, sigma, steps)
    first = (y - deltas) * numpy.exp(-epsilons)
    second = 1 - deltas - numpy.exp(epsilons) * (1 - y)
    return float(max(0.0, first.max(), second.max()))


@functools.lru_cache(maxsize=64)
def _profile(q: float, sigma: float, steps: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(epsilons, deltas) by privacy loss distributions (dp-accounting), pessimistic."""
    with guarded(((q, sigma, steps),), 1e-5):
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
        from dp_accounting.pld import PLDAccountant

        accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps))
        epsilons = numpy.concatenate([numpy.linspace(0, 4, 81), numpy.linspace(4.1, 20, 80)])
        return epsilons, numpy.array([accountant.get_delta(float(e)) for e in epsilons])

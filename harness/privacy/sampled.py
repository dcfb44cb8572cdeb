"""Epsilon of Gaussian steps whose batches are not Poisson samples: privacy loss distributions of the divergence of one step.

The divergence is the sampling's (harness/privacy/samplings.py), for the example against its absence and the other way round;
Connect-the-Dots (2207.04380) makes a pessimistic distribution of each, as for noise of random scale (mixtures.py). The second
accountant is dp-accounting's own for the same event, and what no certificate may be under is PRV's value for a Poisson sample
that holds an example as often.
"""

from __future__ import annotations

import functools
import math

from dpft.harness.errors import CannotRun
from dpft.harness.privacy import mixtures
from dpft.harness.privacy.accountant import Composition, check_numbers, guarded, prv_epsilon, tolerance
from dpft.harness.privacy.ledger import Ledger
from dpft.harness.privacy.samplings import Poisson


def composition(ledger: Ledger) -> Composition:
    """(sampling probability, noise multiplier, number) of a ledger's distinct events."""
    counts: dict[tuple[float, float], int] = {}
    for event in ledger.events:
        kind = (event["sampling_probability"], event["noise_multiplier"])
        counts[kind] = counts.get(kind, 0) + event["step_to"] - event["step_from"]
    return tuple((*kind, steps) for kind, steps in sorted(counts.items()))


@functools.lru_cache(maxsize=512)
def estimate(sampling: Poisson, kinds: Composition, delta: float, target: float) -> float:
    """Epsilon of a composition, not below the truth. Raises CannotRun where there is no number for it."""
    return up_to(sampling, kinds, [steps for *_, steps in kinds], delta, target)


def up_to(sampling: Poisson, kinds: Composition, counts: list[int], delta: float, target: float) -> float:
    """The same of the first `counts` steps of each kind, on the grid of the whole."""
    check_numbers(kinds, delta, target)
    if not kinds:
        return 0.0
    with guarded(kinds, delta):
        return mixtures.composed_epsilon(_distributions(sampling, kinds, delta, target), counts, delta)


@functools.lru_cache(maxsize=4)
def _distributions(sampling: Poisson, kinds: Composition, delta: float, target: float) -> list[tuple]:
    """(remove, add) of each kind, on one grid."""
    steps = sum(count for *_, count in kinds)
    interval, tail = mixtures.interval(tolerance(target, delta)[0], steps), 1e-3 * delta / steps + 4e-15
    return [
        tuple(mixtures.distribution(sampling.divergence(q, sigma, way), interval, tail) for way in (True, False))
        for q, sigma, _ in kinds
    ]


def lower(sampling: Poisson, kinds: Composition, delta: float, target: float) -> float:
    """Epsilon that no accounting can be under: all others add nothing, and the example is there as often as it is."""
    return prv_epsilon(tuple((sampling.least_probability(q), s, n) for q, s, n in kinds), delta, target)[0]


@functools.lru_cache(maxsize=512)
def second(sampling: Poisson, kinds: Composition, delta: float, target: float) -> float | None:
    """Epsilon by dp-accounting's own distributions of the same events; None where it cannot be had."""
    check_numbers(kinds, delta, target)
    if not kinds:
        return 0.0
    interval = sampling.wider * mixtures.interval(tolerance(target, delta)[0], sum(steps for *_, steps in kinds))
    try:
        with guarded(kinds, delta):
            from dp_accounting import NeighboringRelation, SelfComposedDpEvent
            from dp_accounting.pld import PLDAccountant

            accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
            for q, sigma, steps in kinds:
                accountant.compose(SelfComposedDpEvent(sampling.dp_event(q, sigma), int(steps)))
            value = float(accountant.get_epsilon(delta))
    except CannotRun:
        return None
    return value if math.isfinite(value) else None

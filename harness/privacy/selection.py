"""What choosing the best of several runs costs, where their number is random (Papernot & Steinke, 2110.03620).

The protocol that is charged for: draw a number K of tries from one of LAWS; draw the settings of each try at random from a
grid, whatever earlier tries gave; train each with seeds of its own; release the one model that scores best and nothing of
the others. A grid that is searched whole is a fixed K, for which no such bound holds: it costs the composition of all runs.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy.accountant import Composition, calibrate, check_numbers, guarded, prv_epsilon

LAWS = {
    "logarithmic": 0.0,
    "geometric": 1.0,
    "poisson": math.inf,
}  # of K: the shape of the negative binomial, or its limit
ORDERS = (*(i / 4 for i in range(6, 64)), *range(16, 64), *range(64, 600, 8))  # Renyi orders
CLOSE = 1e-3


@functools.lru_cache(maxsize=512)
def selected_epsilon(kinds: Composition, delta: float, tries: float, law: str) -> float:
    """Epsilon of the best of K runs, each of `kinds` (q, sigma, steps), K of mean `tries` >= 1 drawn from `law`.

    Theorems 2 and 6 of 2110.03620 by dp-accounting, over Renyi orders: an upper bound, and looser than PRV also for one
    run. Raises BadInput for another law or mean, CannotRun where the accountant has no number.
    """
    check_tries(tries)
    if law not in LAWS:
        raise BadInput(f"The number of tries has no law {law!r}; take one of {', '.join(LAWS)}.")
    check_numbers(kinds, delta, 1.0)
    if not kinds:
        return 0.0
    with guarded(kinds, delta), _quiet():
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
        from dp_accounting.dp_event import ComposedDpEvent, RepeatAndSelectDpEvent
        from dp_accounting.rdp import RdpAccountant

        steps = [SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(s)), int(n)) for q, s, n in kinds]
        accountant = RdpAccountant(ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(RepeatAndSelectDpEvent(ComposedDpEvent(steps), float(tries), LAWS[law]))
        found = float(accountant.get_epsilon(delta))
    if not math.isfinite(found):
        raise CannotRun(f"The best of {tries:g} such runs has no epsilon at delta = {delta:.3g}; add noise.")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes on orders that dp-accounting leaves out: fewer orders give a larger epsilon, never a smaller one."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def cheapest(kinds: Composition, delta: float, tries: float) -> tuple[str, float]:
    """(law, epsilon) of the law that costs least; it depends on the noise alone, so choosing it is free."""
    return min(((law, selected_epsilon(kinds, delta, tries, law)) for law in LAWS), key=lambda pair: pair[1])


@functools.lru_cache(maxsize=512)
def epsilon_each(target: float, delta: float, q: float, steps: int, tries: float) -> float:
    """The largest epsilon that every run may be given so that the best of about `tries` costs at most `target`.

    Raises CannotRun where even a run of epsilon target / 100 costs more.
    """

    def fits(sigma: float) -> bool:
        return cheapest(((q, sigma, steps),), delta, tries)[1] <= target

    low, high = (calibrate(epsilon, delta, q, steps) for epsilon in (target, target / 100))
    if not fits(high):
        raise CannotRun(f"The best of {tries:g} tries costs more than {target:g} at any epsilon; ask for fewer tries.")
    while high > low * (1 + CLOSE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return prv_epsilon(((q, high, steps),), delta, target)[2]


def check_tries(tries: float) -> None:
    """Raises BadInput for a mean that is no number of at least 1."""
    if not (math.isfinite(tries) and tries >= 1):
        raise BadInput(f"A choice has a mean of 1 try or more, not {tries:g}; correct --tries.")

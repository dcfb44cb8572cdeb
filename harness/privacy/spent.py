"""What a ledger's events cost: epsilon, its lower bound by Fisher information, and a second accountant's value.

Events whose noise a Gaussian covers go to the PRV accountant, with PLD and Opacus as checks; where one has noise of random
scale, all of them go to harness/privacy/mixtures.py, with our own FFT as the check; where batches are no Poisson samples, to
harness/privacy/sampled.py, with dp-accounting as the check.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.privacy import mixtures, noise_kinds, pure, sampled
from dpft.harness.privacy.accountant import MAX_EPSILON, Composition, check_numbers, guarded, prv_epsilon, tolerance
from dpft.harness.privacy.ledger import Ledger

SAME_NOISE = 1e-9  # what several releases merge to differs in the last digits from what other numbers of them do


def epsilon(events: Sequence[dict[str, Any]], delta: float, target: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) epsilon of a ledger's events at `delta`, heterogeneous events composed in one call.

    With other noise than Gaussian, `lower` is what the Gaussian of the same Fisher information costs, and `upper` what is
    certified; with other batches than Poisson's, `lower` is what Poisson costs that holds an example as often. `target` only sets
    the tolerances. Raises BadInput for a malformed ledger, CannotRun where the accountant cannot certify (sigma < .3, epsilon >
    20, delta below its resolution, a grid over 2e7 cells, any failure inside it). At delta 0 all three are the pure epsilon
    (harness/privacy/pure.py).
    """
    ledger, delta, target = Ledger.from_events(list(events)), float(delta), float(target)
    if delta == 0:
        exact = pure.epsilon(ledger)
        return exact, exact, exact
    if not ledger.sampling.poisson:
        kinds = sampled.composition(ledger)
        found = sampled.estimate(ledger.sampling, kinds, delta, target)
        return min(sampled.lower(ledger.sampling, kinds, delta, target), found), found, certified(found, delta, target)
    covered = covering(ledger)
    if covered is not None:
        lower, estimate, upper = prv_epsilon(covered, delta, target)
    else:
        estimate = mixture_epsilon(kinds_of(ledger), delta, target)
        upper = certified(estimate, delta, target)
        lower = 0.0
    if not all(event["mechanism"] == "gaussian" for event in ledger.events):
        bound = fisher_epsilon(ledger, delta, target)
        lower = 0.0 if bound is None else min(bound, estimate)
    return lower, estimate, upper


def covering(ledger: Ledger) -> Composition | None:
    """(q, sigma, steps) of the Poisson-sampled Gaussians that cover the ledger's events, of rounds one for each; None where one
    has noise of random scale, or batches are no Poisson samples."""
    if not ledger.sampling.poisson:
        return None
    return _counted(ledger, noise_kinds.covering_gaussian)


def _counted(ledger: Ledger, of_release: Any) -> Composition | None:
    counts: dict[tuple[float, float], int] = {}
    for event in ledger.events:
        sigma = _event_sigma(event, of_release)
        if sigma is None:
            return None
        kind = (event["sampling_probability"], sigma)
        counts[kind] = counts.get(kind, 0) + ledger.participations(event)
    found: list[tuple[float, float, int]] = []
    for (q, sigma), steps in sorted(counts.items()):
        if found and found[-1][0] == q and sigma <= found[-1][1] * (1 + SAME_NOISE):
            found[-1] = (*found[-1][:2], found[-1][2] + steps)  # all at the least of the noise
        else:
            found.append((q, sigma, steps))
    return tuple(found)


def _event_sigma(event: dict[str, Any], of_release: Any) -> float | None:
    if event["mechanism"] == "gaussian":
        return event["noise_multiplier"]  # the merged one of all releases
    (release,) = event["releases"]
    return of_release(release["mechanism"], release["noise_multiplier"], release["parameters"])


def kinds_of(ledger: Ledger) -> mixtures.Kinds:
    """The ledger's distinct events with their step counts, as mixtures."""
    counts: dict[tuple[float, tuple[str, float]], int] = {}
    for event in ledger.events:
        sigma = _event_sigma(event, noise_kinds.covering_gaussian)
        if sigma is not None:
            mechanism = ("", sigma)
        else:
            (release,) = event["releases"]
            law = noise_kinds.law_of(release["mechanism"], release["noise_multiplier"], release["parameters"])
            mechanism = (str(law), release["parameters"]["dimension"])
        kind = (event["sampling_probability"], mechanism)
        counts[kind] = counts.get(kind, 0) + ledger.participations(event)
    return tuple((q, mechanism, steps) for (q, mechanism), steps in sorted(counts.items()))


def certified(estimate: float, delta: float, target: float) -> float:
    """The upper epsilon that belongs to an estimate by mixtures. Raises CannotRun above MAX_EPSILON.

    The estimate is an upper bound already; the tolerance is added so that no mechanism gains by its accountant.
    """
    if not estimate <= MAX_EPSILON:
        raise CannotRun(
            f"Cannot certify: epsilon {estimate:.4g} is above {MAX_EPSILON:g}; increase the noise, or decrease q or T."
        )
    return estimate + (tolerance(target, delta)[0] if estimate > 0 else 0.0)


@functools.lru_cache(maxsize=512)
def mixture_epsilon(kinds: mixtures.Kinds, delta: float, target: float) -> float:
    """Epsilon of a composition of mixtures, not below the truth. Raises CannotRun where there is no number for it."""
    checked = _numbers(kinds, delta, target)
    if not kinds:
        return 0.0
    with guarded(checked, delta):
        parts = mixtures.distributions(kinds, delta, tolerance(target, delta)[0])
        return mixtures.composed_epsilon(parts, [steps for _, _, steps in kinds], delta)


def _numbers(kinds: mixtures.Kinds, delta: float, target: float) -> Composition:
    """Refuses targets, deltas, q and T as for a Gaussian; the noise itself has been checked by the ledger."""
    checked = tuple((q, 1.0, steps) for q, _, steps in kinds)
    check_numbers(checked, delta, target)
    return checked


def fisher_epsilon(ledger: Ledger, delta: float, target: float) -> float | None:
    """Lower PRV epsilon of the Gaussians with the ledger's Fisher informations; None where it cannot be had.

    No certificate may be under it (noise_kinds.fisher_gaussian says why).
    """
    try:
        found = _counted(ledger, noise_kinds.fisher_gaussian)
        return None if found is None else prv_epsilon(found, delta, target)[0]
    except CannotRun:
        return None


def mixture_check(kinds: mixtures.Kinds, delta: float, target: float) -> float | None:
    """Epsilon of a composition of mixtures by the second accountant; None where it cannot be had."""
    from dpft.harness.privacy.mixture_check import epsilon_by_fft

    checked = _numbers(kinds, delta, target)
    try:
        with guarded(checked, delta):
            value = epsilon_by_fft(kinds, delta, target, tolerance(target, delta)[0])
    except CannotRun:
        return None
    return value if value is not None and math.isfinite(value) else None

"""Pure epsilon: delta is 0. Of one number a step with Laplace noise, and of nothing else.

A number that one example moves by C at most, with noise Laplace(b C), is 1/b-DP. Of a batch that each example joins with
probability q it is log(1 + q (exp(1/b) - 1))-DP: by so much is the density with the example above that without it at most, and
in the other direction it is -log(1 - q (1 - exp(-1/b))), which is less. T steps cost T times as much, and no accountant can do
better: where all draws are above all sums the loss is that large. So the three numbers of a certificate are one.

Its draws have no end (harness/train/noise.py, `endless_laplace`): noise that ends has a delta above 0. A vector that is clipped
in L2 has no such certificate (noise_kinds.py), so a release is booked with its dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.privacy.accountant import MAX_EPSILON, guarded, tolerance
from dpft.harness.privacy.ledger import Ledger

ONE_NUMBER = {"shape": "coordinates", "dimension": 1}  # the parameters of such a release
ENDS = "noise of stream 1 ends, so it has a delta above 0."
ROUNDING = 1e-12  # relative: what calibration leaves, so that T steps are not above the target by their last digit


def of_one_number(mechanism: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a release is one number with Laplace noise without an end."""
    return mechanism == "laplace" and dict(parameters) == ONE_NUMBER


def fit(target: float, sampling_probability: float, steps: int) -> float:
    """The standard deviation of the noise, in units of C, with which so many steps cost `target`.

    Raises CannotRun for a target above MAX_EPSILON.
    """
    if not 0 < target <= MAX_EPSILON:
        raise CannotRun(f"Cannot certify epsilon {target!r}: choose epsilon above 0 and at most {MAX_EPSILON:g}.")
    shift = math.log1p(math.expm1(target * (1 - ROUNDING) / steps) / sampling_probability)
    return math.sqrt(2) / shift


def of_step(sampling_probability: float, noise_multiplier: float) -> float:
    """What one step costs."""
    return math.log1p(sampling_probability * _grown(noise_multiplier))


def _grown(noise_multiplier: float) -> float:
    """exp(1/b) - 1; the variance of Laplace(b) is 2 b^2."""
    shift = math.sqrt(2) / noise_multiplier
    return math.expm1(shift) if shift < 700 else math.inf


def epsilon(ledger: Ledger) -> float:
    """What a ledger costs at delta 0. Raises CannotRun where noise has no pure epsilon, and above MAX_EPSILON."""
    spent = []
    for event in ledger.events:
        for release in event["releases"]:
            if not of_one_number(release["mechanism"], release.get("parameters", {})):
                raise CannotRun(
                    f"Cannot certify delta 0: it takes one number with Laplace noise, and {release['name']!r} is not that; "
                    "choose a delta above 0."
                )
            steps = event["step_to"] - event["step_from"]
            spent.append(steps * of_step(event["sampling_probability"], release["noise_multiplier"]))
    total = math.fsum(spent)
    if not total <= MAX_EPSILON:
        raise CannotRun(f"Cannot certify: epsilon {total:.4g} is above {MAX_EPSILON:g}; increase the noise.")
    return total


def curve(sampling_probability: float, noise_multiplier: float, steps: int) -> list[float]:
    """Epsilon after 0, 1, ..., T steps."""
    each = of_step(sampling_probability, noise_multiplier)
    return [step * each for step in range(steps + 1)]


def by_distributions(ledger: Ledger, target: float) -> float | None:
    """The same by a second accountant, dp-accounting's privacy loss distributions, step by step; None where it fails."""
    error, total = tolerance(target, 0.0)[0], 0.0
    for event in ledger.events:
        q, steps = event["sampling_probability"], event["step_to"] - event["step_from"]
        try:
            with guarded(((q, event["noise_multiplier"], steps),), 0.0):
                from dp_accounting.pld.privacy_loss_distribution import from_laplace_mechanism

                found = from_laplace_mechanism(
                    parameter=event["noise_multiplier"] / math.sqrt(2),
                    sensitivity=1.0,
                    value_discretization_interval=error / (10 * ledger.steps),
                    sampling_prob=q,
                )
                total += steps * float(found.get_epsilon_for_delta(0.0))
        except CannotRun:
            return None
    return total if math.isfinite(total) else None

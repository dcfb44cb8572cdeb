"""From a spec to its privacy parameters: q, sigma, delta and the epsilon of every step. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpft.harness import registry
from dpft.harness.errors import CannotRun
from dpft.harness.privacy import calibrate, epsilon_curve
from dpft.harness.spec import RunSpec


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run will spend. epsilon_curve[t]: certified upper epsilon after t steps; null fields: not private."""

    num_examples: int
    sampling_probability: float
    delta: float | None
    noise_multiplier: float | None
    epsilon_curve: list[float] | None


def plan(spec: RunSpec, data_dir: Path | None) -> PrivacyPlan:
    """Calibrate `spec`. Raises CannotRun when the budget cannot be reached or the batch is larger than the data."""
    n = registry.task(spec.task)(spec.task_options).train_size(data_dir)
    if spec.batch_size > n:
        raise CannotRun(
            f"The batch size {spec.batch_size} is larger than the {n} training examples; choose a smaller one."
        )
    q = spec.batch_size / n
    if spec.epsilon is None:
        return PrivacyPlan(n, q, None, None, None)
    delta = spec.delta if spec.delta is not None else 1 / (2 * n)
    if delta >= 1 / n:
        raise CannotRun(
            f"delta = {delta:g} is not below 1/N = {1 / n:g}, so it protects nobody; choose 1/(2N) or less."
        )
    sigma = calibrate(spec.epsilon, delta, q, spec.steps)
    return PrivacyPlan(n, q, delta, sigma, epsilon_curve(sigma, q, spec.steps, delta, spec.epsilon))

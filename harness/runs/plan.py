"""From a spec to its privacy parameters: q, sigma, delta and the epsilon of every step. Needs no torch itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpft.harness.errors import CannotRun
from dpft.harness.privacy.calibration import Noise, Wanted, curve_of, fit
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run will spend. epsilon_curve[t]: certified upper epsilon after t steps; null fields: not private."""

    num_examples: int
    sampling_probability: float
    delta: float | None
    noise: Noise | None
    epsilon_curve: list[float] | None

    @property
    def noise_multiplier(self) -> float | None:
        """Standard deviation of one coordinate of the noise in units of the clip norm."""
        return None if self.noise is None else self.noise.noise_multiplier


def plan(
    spec: RunSpec,
    data_dir: Path | None,
    dimension: Callable[[], int] | None = None,
    num_examples: int | None = None,
) -> PrivacyPlan:
    """Calibrate `spec`. Raises CannotRun when the budget cannot be reached or the batch is larger than the data.

    dimension: says how many coordinates the released sum has, for noise whose epsilon depends on it. num_examples: N where
    it is known; None: as the task says.
    """
    n = num_examples or registry.task(spec.task)(spec.task_options).train_size(data_dir)
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
    wanted = Wanted(spec.epsilon, delta, q, spec.steps, spec.noise_stream)
    spherical = spec.mechanism != "gaussian" and spec.noise_shape == "spherical"
    if spherical and dimension is None:
        raise CannotRun(f"Noise of mechanism {spec.mechanism} can be calibrated only where the model is known.")
    noise = fit(wanted, spec.mechanism, spec.noise_shape, spec.noise_law, dimension() if spherical else None)
    return PrivacyPlan(n, q, delta, noise, curve_of(noise, wanted))

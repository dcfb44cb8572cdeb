"""From a spec to its privacy parameters: q, sigma, delta, what is released when, epsilon after every step. Needs no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import units
from dpft.harness.privacy.accountant import check_numbers
from dpft.harness.privacy.calibration import Noise, Wanted, curve_of, fit
from dpft.harness.privacy.samplings import POISSON, Poisson, made
from dpft.harness.privacy.shares import counted, noise_multipliers
from dpft.harness.runs import registry, users
from dpft.harness.runs.releases import Schedule, schedule
from dpft.harness.runs.spec import RunSpec
from dpft.harness.runs.users import Sizes


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run will spend.

    Attributes:
        num_examples: the public N; where the unit is a user, of the examples that count.
        sampling_probability: B/N, of every example in every step, on average over the steps; of users where those are sampled.
        sampling: how batches are drawn, and so with what probability where an example may be.
        delta: 0 for pure epsilon; None where the run is not private, as `noise` and `epsilon_curve`.
        noise: of a whole step; what its releases have of it, `releases` says.
        epsilon_curve: certified upper epsilon after 0..T steps.
        shares: (first step, step after the last, share of the budget by name) of every stretch of equal steps.
        releases: the same with noise multipliers, each in units of its own bound; empty where the run is not private.
        sizes: how many users there are, and of what batches are drawn.
    """

    num_examples: int
    sampling_probability: float
    delta: float | None
    noise: Noise | None
    epsilon_curve: list[float] | None
    shares: Schedule = ()
    releases: Schedule = ()
    sampling: Poisson = POISSON
    sizes: Sizes | None = None

    @property
    def probability(self) -> float:
        """With what probability an example is drawn in a step in which it may be: what the ledger books."""
        return self.sampling.probability(self.sampling_probability)

    @property
    def noise_multiplier(self) -> float | None:
        """Of a whole step: standard deviation of one coordinate of a lone release's noise in units of its bound."""
        return None if self.noise is None else self.noise.noise_multiplier

    def noises(self, step: int) -> dict[str, Noise]:
        """The noise of every release of a step, by name: `noise.entry(name)` of each is to be booked. Empty: not private."""
        if self.noise is None:
            return {}
        at = bisect_right(self.releases, step, key=lambda stretch: stretch[0]) - 1
        return {
            name: replace(self.noise, noise_multiplier=multiplier) for name, multiplier in self.releases[at][2].items()
        }


def plan(
    spec: RunSpec,
    data_dir: Path | None,
    dimension: Callable[[], int] | None = None,
    num_examples: int | None = None,
    num_users: int | None = None,
) -> PrivacyPlan:
    """Calibrate `spec`. Raises CannotRun when the budget cannot be reached or the batch is larger than the data, BadInput for
    releases that do not add up, or share a step with noise that cannot be shared.

    dimension: says how many coordinates the released sum has, for noise whose epsilon depends on it. num_examples, num_users:
    where they are known; None: as the task says.
    """
    sizes = users.sizes(spec, data_dir, num_examples, num_users)
    n, who = sizes.sampled, "training examples" if sizes.sampled == sizes.examples else "users"
    if spec.batch_size > n:
        raise CannotRun(f"The batch size {spec.batch_size} is larger than the {n} {who}; choose a smaller one.")
    kind = units.sampling_of(*(getattr(spec, key) for key in units.SETTINGS))
    sampling = made(kind, n, spec.batch_size, spec.truncated_batch_size, spec.bands, spec.group_size)
    share = spec.batch_size / n
    q, turns = sampling.probability(share), sampling.participations(spec.steps)
    if spec.epsilon is None:
        return PrivacyPlan(sizes.examples, share, None, None, None, _shares(spec), sampling=sampling, sizes=sizes)
    delta = spec.delta if spec.delta is not None else 1 / (2 * sizes.protected)
    if delta >= 1 / sizes.protected:
        of = "N" if sizes.users is None else "U"
        raise CannotRun(
            f"delta = {delta:g} is not below 1/{of} = {1 / sizes.protected:g}, so it protects nobody; choose 1/(2{of}) or less."
        )
    if delta > 0:
        check_numbers(((q, 1.0, turns),), delta, spec.epsilon)
    shares = _shares(spec)
    kinds = counted((last - first, share) for first, last, share in shares)
    wanted = Wanted(spec.epsilon, delta, q, turns, spec.noise_stream, kinds, sampling)
    spherical = spec.mechanism != "gaussian" and spec.noise_shape == "spherical"
    if spherical and dimension is None:
        raise CannotRun(f"Noise of mechanism {spec.mechanism} can be calibrated only where the model is known.")
    noise = fit(wanted, spec.mechanism, spec.noise_shape, spec.noise_law, dimension() if spherical else None)
    sigma = noise.noise_multiplier
    releases = tuple((first, last, noise_multipliers(sigma, share)) for first, last, share in shares)
    spent = curve_of(noise, wanted)
    curve = [spent[sampling.participations(step)] for step in range(spec.steps + 1)]
    return PrivacyPlan(sizes.examples, share, delta, noise, curve, shares, releases, sampling, sizes)


def _shares(spec: RunSpec) -> Schedule:
    method = registry.instance(spec)
    found = schedule(method, method.rule, spec.steps)
    several = [(first, names) for first, _, names in found if len(names) > 1]
    if several and spec.mechanism != "gaussian":
        first, names = several[0]
        raise BadInput(
            f"Step {first} of {spec.method} releases {' and '.join(names)}; only Gaussian noise can be shared, so leave out "
            f"mechanism={spec.mechanism}."
        )
    if several and (spec.sampler == "truncated" or spec.bands > 1):
        first, names = several[0]
        setting = f"bands={spec.bands}" if spec.bands > 1 else "sampler=truncated"
        raise BadInput(
            f"Step {first} of {spec.method} releases {' and '.join(names)}; with {setting} a step may release "
            "one sum, so leave out one of them."
        )
    return found

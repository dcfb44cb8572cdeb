"""The noise of a mechanism that meets a target: its scale, the law of its random scale, and epsilon after every step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpft.harness.cache import cached
from dpft.harness.errors import CannotRun
from dpft.harness.privacy import mixtures, noise_kinds, pure, sampled, tail
from dpft.harness.privacy.accountant import Unmet, bracket, calibrate, check_numbers, library_version, tolerance
from dpft.harness.privacy.curve import epsilon_curve
from dpft.harness.privacy.ledger import Release
from dpft.harness.privacy.samplings import POISSON, Poisson
from dpft.harness.privacy.scale_law import ScaleLaw, parse
from dpft.harness.privacy.shares import Kinds, cache_key, least
from dpft.harness.privacy.spent import certified, kinds_of, mixture_epsilon

CURVE_POINTS = 24
# lmo_eps_0.3.json of github.com/rayhanul/lmo-dp, as its accountant reads it
PUBLISHED_LAW = "0.4*gamma(2,1)+0.1*exponential(5)+0.3*uniform(0,1)"
CERTIFIED = 3  # laws of the search that are calibrated, of those with the least noise at equal Fisher information


@dataclass(frozen=True)
class Noise:
    """What is added to the clipped sum: a mechanism, its standard deviation in units of C, its other parameters."""

    mechanism: str
    noise_multiplier: float
    parameters: dict[str, Any] = field(default_factory=dict)

    def entry(self, name: str) -> Release:
        """The ledger's entry. Raises ValueError where the parameters do not make a mechanism that can be accounted."""
        return Release(
            name=name,
            mechanism=self.mechanism,
            noise_multiplier=self.noise_multiplier,
            parameters=self.parameters,
        )


@dataclass(frozen=True)
class Wanted:
    """The budget that noise is calibrated to; delta 0: pure epsilon.

    sampling_probability, steps: of an example where it may be drawn, and how often it may be (harness/privacy/samplings.py).
    noise_stream: how it will be drawn (harness/train/noise.py). shares: of the kinds of steps, as `shares.counted` gives them;
    empty: one release a step. Raises ValueError where those are of another number of steps.
    """

    target: float
    delta: float
    sampling_probability: float
    steps: int
    noise_stream: int = 1
    shares: Kinds = ()
    sampling: Poisson = POISSON

    def __post_init__(self) -> None:
        if self.shares and sum(number for number, _ in self.shares) != self.steps:
            raise ValueError(f"the kinds of steps {self.shares!r} are not those of {self.steps} steps")

    def delta_for(self, noise: Noise) -> float:
        """The delta at which epsilon is computed: what is promised, less what the tail of such noise lacks."""
        entry = noise.entry("gradient")
        own = (self.sampling_probability, self.steps, self.delta, self.noise_stream, self.shares, self.sampling)
        return tail.of_noise(entry, *own)

    @property
    def key(self) -> dict[str, Any]:
        """What a calibration on disk depends on."""
        from importlib.metadata import version

        return {
            "target": self.target,
            "delta": self.delta,
            "q": self.sampling_probability,
            "steps": self.steps,
            "prv_accountant": library_version(),
            "dp_accounting": version("dp-accounting"),
            **tail.cache_key(self.noise_stream),
            **cache_key(self.shares),
            **({} if self.sampling.poisson else {"sampling": self.sampling.to_dict()}),
        }


def fit(wanted: Wanted, mechanism: str, shape: str, law: str | None, dimension: int | None) -> Noise:
    """The least noise of a mechanism that meets `wanted`; cached on disk.

    law: of u for lmo and plrv, whose scale is then fitted; None: searched (`search`). dimension: coordinates of the
    released sum, for spherical noise. Raises CannotRun as `calibrate` does, ValueError for a law outside its family.
    """
    if wanted.delta == 0:
        if (mechanism, shape) != ("laplace", "coordinates"):
            raise CannotRun(f"Cannot certify delta 0 with noise of mechanism {mechanism}; choose a delta above 0.")
        sigma = pure.fit(wanted.target, wanted.sampling_probability, wanted.steps)
        return Noise(mechanism, sigma, dict(noise_kinds.ONE_NUMBER))
    if mechanism == "gaussian" or shape == "coordinates":
        sigma = _gaussian(wanted)
        if mechanism == "gaussian":
            return Noise(mechanism, sigma)
        return Noise(mechanism, sigma * noise_kinds.LAPLACE_TO_GAUSSIAN, {"shape": shape})
    if mechanism == "laplace":
        return _spherical(wanted, mechanism, None, dimension)
    if law is not None:
        return _spherical(wanted, mechanism, law, dimension)
    return search(wanted, mechanism, dimension)[0][1]


def search(wanted: Wanted, mechanism: str, dimension: int) -> list[tuple[str, Noise]]:
    """(law, calibrated noise) of the best laws of lmo or plrv at a certified budget, the least noise first.

    As the LMO paper's offline search (2405.18776), with honest accounting: of all laws of a grid, those with the least
    E[u^2] E[u^-2], which is the squared noise at equal Fisher information, are calibrated. It is at least 1, and 1 only for
    a constant u: the best law is always the one nearest to a constant that the grid has.
    """
    ranked = sorted(_grid(mechanism), key=lambda text: parse(text).mean_square * parse(text).inverse_mean_square)
    fitted = [(text, _spherical(wanted, mechanism, text, dimension)) for text in ranked[:CERTIFIED]]
    return sorted(fitted, key=lambda item: item[1].noise_multiplier)


def _grid(mechanism: str) -> Iterator[str]:
    """Laws to search, each with mean about 1: the families' ranges are ours, and bounded away from a constant u."""
    shapes = (2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0)
    if mechanism == "plrv":
        yield from (f"gamma({k!r},{1 / k!r})" for k in shapes)
        return
    for k, gamma, exponential, low in itertools.product(shapes, (0.1, 0.4, 0.8), (0.02, 0.1), (0.0, 0.5)):
        rest = 1 - gamma - exponential
        yield f"{gamma!r}*gamma({k!r},{1 / k!r})+{exponential!r}*exponential(1.0)+{rest:.6g}*uniform({low!r},{2 - low!r})"


def _gaussian(wanted: Wanted) -> float:
    sigma = calibrate(
        wanted.target, wanted.delta, wanted.sampling_probability, wanted.steps, wanted.noise_stream, wanted.shares
    )
    if wanted.sampling.poisson:
        return sigma

    def at(tried: float) -> tuple[float, float, float]:
        left, steps = wanted.delta_for(Noise("gaussian", tried)), wanted.steps
        kinds = ((wanted.sampling_probability, least(tried, wanted.shares), steps),)
        return _values(sampled.estimate(wanted.sampling, kinds, left, wanted.target), wanted)

    start = sigma * wanted.sampling.together  # at least about as much as it takes: too little is slow to account for
    return cached("noise", wanted.key, _positive, lambda: _bracketed(at, start, wanted))


def _values(estimate: float, wanted: Wanted) -> tuple[float, float, float]:
    return estimate, estimate, estimate + tolerance(wanted.target, wanted.delta)[0]


def _positive(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _bracketed(at: Any, start: float, wanted: Wanted) -> float:
    try:
        return bracket(at, start, wanted.target)
    except Unmet as unmet:
        raise CannotRun(
            f"{unmet} (q={wanted.sampling_probability:g}, T={wanted.steps}, delta={wanted.delta:g})."
        ) from None


def _spherical(wanted: Wanted, mechanism: str, law: str | None, dimension: int | None) -> Noise:
    """Spherical noise of that law up to scale (None: Laplace), scaled to meet `wanted`."""
    if dimension is None:
        raise ValueError("the dimension of the release is not known")
    check_numbers(((wanted.sampling_probability, 1.0, wanted.steps),), wanted.delta, wanted.target)

    def noise(multiplier: float) -> Noise:
        parameters: dict[str, Any] = {"shape": "spherical", "dimension": dimension}
        if law is not None:
            parameters["law"] = str(_to_spread(mechanism, law, dimension, multiplier))
        return Noise(mechanism, multiplier, parameters)

    def at(multiplier: float) -> tuple[float, float, float]:
        tried = noise(multiplier)
        kind = (*_kind(tried, wanted), wanted.steps)
        return _values(mixture_epsilon((kind,), wanted.delta_for(tried), wanted.target), wanted)

    inputs = {**wanted.key, "mechanism": mechanism, "law": law, "dimension": dimension}
    return noise(cached("noise", inputs, _positive, lambda: _least(at, wanted, mechanism, law, dimension)))


def _to_spread(mechanism: str, law: str, dimension: int, multiplier: float) -> ScaleLaw:
    """The law scaled so that one coordinate of the noise has that standard deviation."""
    found = noise_kinds.family_law(mechanism, law)
    return found.scaled(noise_kinds.spread(found, dimension) / multiplier)


def _least(at: Any, wanted: Wanted, mechanism: str, law: str | None, dimension: int) -> float:
    """The noise multiplier that meets `wanted`, searched from where its Fisher information is that of the right Gaussian."""
    sigma = _gaussian(wanted)
    found = None if law is None else noise_kinds.family_law(mechanism, law)
    ratio = 1.0 if found is None else math.sqrt(found.mean_square * found.inverse_mean_square)
    return _bracketed(at, sigma * ratio, wanted)


def _kind(noise: Noise, wanted: Wanted) -> tuple[float, tuple[str, float]]:
    from dpft.harness.privacy.ledger import Ledger

    ledger = Ledger()
    ledger.append(0, wanted.sampling_probability, [noise.entry("gradient")])
    return kinds_of(ledger)[0][:2]


def curve_of(noise: Noise, wanted: Wanted) -> list[float]:
    """Upper epsilon after 0, 1, ..., `wanted.steps` steps; as `epsilon_curve`, for whatever can be certified."""
    if wanted.delta == 0:
        return pure.curve(wanted.sampling_probability, noise.noise_multiplier, wanted.steps)
    sigma = noise_kinds.covering_gaussian(noise.mechanism, noise.noise_multiplier, noise.parameters)
    q, steps, delta, target = wanted.sampling_probability, wanted.steps, wanted.delta_for(noise), wanted.target
    if sigma is not None and wanted.sampling.poisson:
        return epsilon_curve(least(sigma, wanted.shares), q, steps, delta, target)
    points = _points(_kind(noise, wanted), wanted, delta)
    values = [0.0]
    for count, value in points:  # between two counts the later one's: epsilon grows with the steps
        values += [value] * (count - len(values) + 1)
    return values


@functools.lru_cache(maxsize=64)
def _points(kind: tuple[float, tuple[str, float]], wanted: Wanted, delta: float) -> tuple[tuple[int, float], ...]:
    """(steps, upper epsilon) at growing step counts; the last is what `epsilon` says of the whole ledger."""
    steps = wanted.steps
    counts = sorted({math.ceil(steps * (i / CURVE_POINTS) ** 2) for i in range(1, CURVE_POINTS)} | {steps})
    error = tolerance(wanted.target, delta)[0]
    if wanted.sampling.poisson:
        parts = mixtures.distributions(((*kind, steps),), delta, error)
        spent = [mixtures.composed_epsilon(parts, [count], delta) for count in counts]
    else:
        (q, (_, sigma)) = kind
        whole = ((q, least(sigma, wanted.shares), steps),)
        spent = [sampled.up_to(wanted.sampling, whole, [count], delta, wanted.target) for count in counts]
    values = [*(value + error for value in spent[:-1]), certified(spent[-1], delta, wanted.target)]
    return tuple(zip(counts, reversed(list(itertools.accumulate(reversed(values), min))), strict=True))

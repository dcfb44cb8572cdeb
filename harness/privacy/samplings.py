"""How batches are drawn, as the accounting sees it. The samplers themselves are harness/train/sampling.py.

Every event of a ledger has a sampling probability and a sampling; Poisson is what an event without a word about it has. One
ledger has one sampling. In each case a neighbour has one gradient that is zero, and who is in a batch does not depend on data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.privacy.groups import Grouped
from dpft.harness.privacy.poisson import POISSON, Poisson


@dataclass(frozen=True)
class Truncated(Poisson):
    """Poisson, and of a batch above `truncated_batch_size` so many at random (2508.15089): no batch is larger.

    One step is a mixture: with probability t the others alone fill the batch, and then the example replaces another one (twice
    the sensitivity, both neighbours sampled), else it is a Poisson-sampled Gaussian (dp-accounting's
    TruncatedSubsampledGaussianDpEvent, for which examples are added or removed). A zero-out neighbour keeps its place in the
    batch, and moves the sum by less than that replacement.
    """

    kind: ClassVar[str] = "truncated"
    poisson: ClassVar[bool] = False

    num_examples: int
    truncated_batch_size: int

    def told(self) -> str:
        return f"Poisson sampling cut at {self.truncated_batch_size:,} examples"

    def check(self, probability: float, releases: tuple[Any, ...]) -> None:
        _one_gaussian(self, releases)

    def parts(self, probability: float) -> tuple[float, float]:
        """(t, probability that the example is in the batch where the others fill it)."""
        from scipy import stats

        cap, n = self.truncated_batch_size, self.num_examples
        full = float(stats.binom.sf(cap - 1, n - 1, probability))
        if full == 0.0:
            return 0.0, 0.0
        return full, min(1.0, float(stats.binom.sf(cap, n, probability)) * cap / n / full)

    def divergence(self, probability: float, sigma: float, remove: bool) -> Callable[[Any], Any]:
        from dpft.harness.privacy.mixtures import sampled_delta

        full, inside = self.parts(probability)
        alone, replaced = sampled_delta(_shifted(sigma), probability, remove), _replaced(inside, sigma)
        return lambda eps: (1 - full) * alone(eps) + (full * replaced(eps) if full > 0 else 0.0)

    def dp_event(self, probability: float, sigma: float) -> Any:
        from dp_accounting import TruncatedSubsampledGaussianDpEvent

        return TruncatedSubsampledGaussianDpEvent(self.num_examples, probability, self.truncated_batch_size, sigma)

    def least_probability(self, probability: float) -> float:
        full, inside = self.parts(probability)
        return (1 - full) * probability + full * inside


@dataclass(frozen=True)
class Cyclic(Poisson):
    """`groups` fixed public groups of equal size, of which step t samples group t mod `groups` alone, at `groups` times the rate;
    the noise of as many steps is correlated by a banded strategy with columns of length 1 (harness/train/correlated.py).

    Theorem 4 of 2306.08153: the steps of one round cost one Poisson-sampled Gaussian at the strategy's sensitivity, which is 1.
    An example is drawn once a round, and what it adds has left the bands when its group is next: so a round is one event of
    any composition, and every step of the run must have the same noise.
    """

    kind: ClassVar[str] = "cyclic"

    groups: int

    def participations(self, steps: int) -> int:
        return math.ceil(steps / self.groups)

    def probability(self, share: float) -> float:
        return self.groups * share

    def told(self) -> str:
        return f"cyclic Poisson sampling of {self.groups} group{'s' if self.groups > 1 else ''}"

    def check(self, probability: float, releases: tuple[Any, ...]) -> None:
        if self.groups > 1:
            _one_gaussian(self, releases)

    def follow(self, other: Poisson) -> None:
        super().follow(other)
        if self.groups > 1:
            raise ValueError("noise that is correlated over steps is accounted for only where all steps are alike")


SAMPLINGS: dict[str, type[Poisson]] = {kind.kind: kind for kind in (Poisson, Truncated, Cyclic, Grouped)}
SAMPLERS = tuple(
    kind for kind in SAMPLINGS if kind != "grouped"
)  # what a run may ask for; the unit of privacy makes the other


def parsed(content: Any) -> Poisson:
    """The sampling that an event of a ledger names. Raises ValueError for any other than `to_dict` gives."""
    known = [kind for kind in SAMPLINGS if kind != POISSON.kind]
    if not isinstance(content, Mapping) or content.get("kind") not in known:
        raise ValueError(
            f"its sampling is {content!r}, of no kind that is known ({', '.join(known)}); Poisson is left out"
        )
    kind, own = SAMPLINGS[content["kind"]], {key: value for key, value in content.items() if key != "kind"}
    expected = {each.name for each in fields(kind)}
    if own.keys() != expected:
        raise ValueError(f"its sampling must have kind and {', '.join(sorted(expected))}, found {sorted(content)}")
    return kind(**own)


def of_event(event: Mapping[str, Any]) -> Poisson:
    """The sampling of an event of a ledger. Raises ValueError as `parsed`."""
    return parsed(event["sampling"]) if "sampling" in event else POISSON


def made(
    kind: str,
    num_examples: int,
    batch_size: int,
    truncated_batch_size: int | None,
    groups: int,
    group_size: int | None = None,
) -> Poisson:
    """The sampling of a run's settings; kind: of `units.sampling_of`. Raises BadInput for numbers that do not go together."""
    if kind == "grouped":
        return Grouped(group_size)
    if kind == "truncated":
        cap = default_cap(num_examples, batch_size) if truncated_batch_size is None else truncated_batch_size
        if cap < batch_size:
            raise BadInput(
                f"truncated_batch_size = {cap} is below the expected batch size {batch_size}, so most batches would be cut; "
                "raise it, or leave it out."
            )
        return Truncated(num_examples, min(cap, num_examples))
    if kind == "cyclic":
        if groups * batch_size > num_examples:
            raise BadInput(
                f"A batch of {batch_size} from one of {groups} groups of {num_examples} examples would need a sampling "
                "probability above 1; lower the batch size or bands."
            )
        return Cyclic(groups)
    return POISSON


# Standard deviations of the batch size from its mean to the default cut.
FAR = 5.0


def default_cap(num_examples: int, batch_size: int) -> int:
    """Where batches are cut unless the run says so: so far out that it costs next to nothing (docs/samplers.md has a table)."""
    deviation = math.sqrt(batch_size * (1 - batch_size / num_examples))
    return min(num_examples, math.ceil(batch_size + FAR * deviation) + 1)


def _one_gaussian(sampling: Poisson, releases: tuple[Any, ...]) -> None:
    others = sorted({release.mechanism for release in releases} - {"gaussian"})
    if others:
        raise ValueError(f"sampling {sampling.kind} is accounted for with gaussian noise only, not with {others[0]}")
    if len(releases) > 1:  # a second question may follow the first answer, for which no one has shown what dominates it
        raise ValueError(f"sampling {sampling.kind} is accounted for with one release a step, not with {len(releases)}")


def _shifted(sigma: float) -> Callable[[Any], Any]:
    """gamma -> H_gamma of N(1, sigma^2) against N(0, sigma^2); Balle & Wang, 1805.06530."""
    import numpy
    from scipy.special import log_ndtr, ndtr

    def base(gamma: Any) -> Any:
        log = numpy.log(numpy.asarray(gamma, dtype=float))
        other = numpy.exp(numpy.minimum(log + log_ndtr(-0.5 / sigma - sigma * log), 0.0))
        return numpy.clip(ndtr(0.5 / sigma - sigma * log) - other, 0.0, 1.0)

    return base


def _replaced(q: float, sigma: float) -> Callable[[Any], Any]:
    """eps -> divergence of (1-q) N(0) + q N(2) against (1-q) N(0) + q N(-2), all of deviation sigma; symmetric."""
    import numpy
    from scipy.special import ndtr

    mu = 2 / sigma

    def divergence(eps: Any) -> Any:
        gamma = numpy.exp(numpy.asarray(eps, dtype=float))
        # the loss is eps where the example's likelihood ratio u solves k u^2 - (gamma-1)(1-q) u - gamma k = 0
        k, linear = q * math.exp(-(mu**2) / 2), (gamma - 1) * (1 - q)
        root = numpy.sqrt(linear**2 + 4 * gamma * k**2)
        u = numpy.where(linear >= 0, (linear + root) / (2 * k), 2 * gamma * k / (root - linear))
        at = numpy.log(u) / mu  # in standard deviations
        own, other = ((1 - q) * ndtr(-at) + q * ndtr(shift - at) for shift in (mu, -mu))
        return numpy.clip(own - gamma * other, 0.0, 1.0)

    return divergence

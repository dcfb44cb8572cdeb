"""The append-only account of what was released: one event per sampled batch, with all releases made on it."""

import math
import numbers
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy import noise_kinds
from dpft.harness.privacy.samplings import POISSON, Poisson, of_event

EVENT_KEYS = ("step_from", "step_to", "sampling_probability", "mechanism", "noise_multiplier", "releases")
RELEASE_KEYS = ("name", "mechanism", "noise_multiplier", "sensitivity_ratio")
MERGE_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Release:
    """One noisy quantity computed on a batch; its noise has std `noise_multiplier * sensitivity` of that quantity.

    `sensitivity_ratio`: the sensitivity in units of the bound that the release had, so 1 of all of ours; other programs may give
    it in units of their clip norm (information only, the accounting does not use it).
    `parameters`: what else defines the mechanism (harness/privacy/noise_kinds.py); none for a Gaussian.
    Raises ValueError for an unknown mechanism, parameters it has not, or a number that is not finite and positive.
    """

    name: str
    mechanism: str = "gaussian"
    noise_multiplier: float
    sensitivity_ratio: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a release needs a name, not {self.name!r}")
        for key in ("noise_multiplier", "sensitivity_ratio"):
            object.__setattr__(self, key, _positive(getattr(self, key), f"{key} of release {self.name!r}"))
        parameters = noise_kinds.check(self.mechanism, self.noise_multiplier, self.parameters)
        object.__setattr__(self, "parameters", parameters)

    def to_dict(self) -> dict[str, Any]:
        """The release as a fresh dict ready for JSON; a Gaussian's has no `parameters`."""
        found = {key: getattr(self, key) for key in RELEASE_KEYS}
        return found if self.mechanism == "gaussian" else found | {"parameters": dict(self.parameters)}


def merged_noise_multiplier(releases: Iterable[Release]) -> float:
    """The noise multiplier of the one Gaussian that equals all `releases` on one batch: (sum s_i^-2)^(-1/2).

    Each has unit sensitivity after scaling by its own, so the joint release is a Gaussian whose mean moves by
    sqrt(sum s_i^-2) standard deviations (Dong et al. 1905.02383, Corollary 3.3). A single release of any mechanism keeps
    its own. Raises ValueError without releases, and for several of which one is not Gaussian.
    """
    releases = list(releases)
    sigmas = [release.noise_multiplier for release in releases]
    if not sigmas:
        raise ValueError("a step of the ledger needs at least one release")
    others = sorted({release.mechanism for release in releases} - {"gaussian"})
    if len(sigmas) > 1 and others:
        raise ValueError(
            f"several releases on one batch can be accounted only if all are gaussian, not with {others[0]}"
        )
    if len(sigmas) == 1:
        return sigmas[0]  # exactly: (s^-2)^(-1/2) is not s in floating point
    smallest = min(sigmas)  # scaled, so that no square overflows
    return smallest / math.sqrt(math.fsum((smallest / sigma) ** 2 for sigma in sigmas))


@dataclass(frozen=True)
class _Event:
    step_from: int
    step_to: int
    sampling_probability: float
    releases: tuple[Release, ...]
    sampling: Poisson = POISSON

    def same_kind(self, other: "_Event") -> bool:
        return all(
            getattr(self, key) == getattr(other, key) for key in ("sampling_probability", "releases", "sampling")
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "step_from": self.step_from,
            "step_to": self.step_to,
            "sampling_probability": self.sampling_probability,
            **({"sampling": self.sampling.to_dict()} if self.sampling != POISSON else {}),
            "mechanism": self.releases[0].mechanism,
            "noise_multiplier": merged_noise_multiplier(self.releases),
            "releases": [release.to_dict() for release in self.releases],
        }


class Ledger:
    """Append-only, run-length encoded list of events; the unit is one sampled batch with all releases made on it."""

    def __init__(self) -> None:
        self._events: list[_Event] = []

    def append(
        self, step: int, sampling_probability: float, releases: Sequence[Release], sampling: Poisson = POISSON
    ) -> None:
        """Book step number `step` (the one about to be taken) before its noise is used.

        Raises ValueError unless `step` is the number of steps so far, q is in (0, 1] and there is a release, and where the
        sampling is not that of the steps before, or not accounted for with such releases.
        """
        if step != self.steps:
            raise ValueError(
                f"step {step} cannot be booked: the ledger holds {self.steps} steps, so the next is {self.steps}"
            )
        self._extend(_Event(self.steps, self.steps + 1, _probability(sampling_probability), tuple(releases), sampling))

    @property
    def sampling(self) -> Poisson:
        """How all its batches were drawn."""
        return self._events[0].sampling if self._events else POISSON

    def participations(self, event: Mapping[str, Any]) -> int:
        """In how many steps of one of its events an example may have been, at most."""
        return self.sampling.participations(event["step_to"] - event["step_from"])

    @property
    def steps(self) -> int:
        """Number of steps booked so far."""
        return self._events[-1].step_to if self._events else 0

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events as fresh dicts ready for JSON, contiguous half-open ranges [step_from, step_to) from 0."""
        return [event.to_dict() for event in self._events]

    @property
    def releases_per_step(self) -> int | None:
        """How many releases every step makes, 1 of none; None where steps differ."""
        counts = {len(event.releases) for event in self._events} or {1}
        return counts.pop() if len(counts) == 1 else None

    def booked(self, step: int) -> dict[str, Any] | None:
        """The event of one step (from 0) alone, None where it is not booked; as of `events`, without making all of them."""
        if not 0 <= step < self.steps:
            return None
        at = bisect_right(self._events, step, key=lambda event: event.step_from) - 1
        return {**self._events[at].to_dict(), "step_from": step, "step_to": step + 1}

    @classmethod
    def from_events(cls, events: Any) -> "Ledger":
        """The ledger that a record holds; adjacent identical events merge.

        Raises BadInput when the ranges are not contiguous from 0, a number is not finite and positive, q is not in
        (0, 1], a key is missing or unknown, or the merged noise multiplier is not that of its releases.
        """
        if not isinstance(events, list):
            raise BadInput(f"The ledger must be a list of events, not {type(events).__name__}.")
        ledger = cls()
        for number, content in enumerate(events):
            try:
                ledger._extend(_parse(content, ledger.steps))
            except ValueError as problem:
                raise BadInput(f"Event {number} of the ledger is malformed: {problem}.") from None
        return ledger

    def _extend(self, event: _Event) -> None:
        merged_noise_multiplier(event.releases)
        event.sampling.check(event.sampling_probability, event.releases)
        if self._events and not self._events[-1].same_kind(event):
            self.sampling.follow(event.sampling)
        if self._events and self._events[-1].same_kind(event):
            last = self._events[-1]
            event = replace(last, step_to=event.step_to)
            self._events[-1] = event
        else:
            self._events.append(event)


def _parse(content: Any, steps: int) -> _Event:
    drawn = isinstance(content, dict) and "sampling" in content
    _keys(content, (*EVENT_KEYS, "sampling") if drawn else EVENT_KEYS, "the event")
    bounds = (content["step_from"], content["step_to"])
    if any(type(bound) is not int for bound in bounds) or bounds[0] != steps or bounds[1] <= bounds[0]:
        raise ValueError(f"steps {bounds[0]!r} to {bounds[1]!r} do not continue from step {steps}")
    if not isinstance(content["releases"], list):
        raise ValueError("its releases are not a list")
    for release in content["releases"]:
        bare = isinstance(release, dict) and release.get("mechanism") == "gaussian"
        _keys(release, RELEASE_KEYS if bare else (*RELEASE_KEYS, "parameters"), "a release")
    releases = tuple(Release(**release) for release in content["releases"])
    merged = merged_noise_multiplier(releases)
    declared = _positive(content["noise_multiplier"], "noise_multiplier")
    if not math.isclose(declared, merged, rel_tol=MERGE_TOLERANCE):
        raise ValueError(f"its noise_multiplier is {declared:g}, but its releases merge to {merged:g}")
    if content["mechanism"] != releases[0].mechanism:
        raise ValueError(f"its mechanism is {content['mechanism']!r}, but its releases have {releases[0].mechanism!r}")
    return _Event(*bounds, _probability(content["sampling_probability"]), releases, of_event(content))


def _keys(content: Any, expected: tuple[str, ...], what: str) -> None:
    if not isinstance(content, dict) or set(content) != set(expected):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{what} must have exactly the keys {sorted(expected)}, found {found}")


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1e300:
        raise ValueError(f"{name} must be a finite positive number, not {value!r}")
    return float(value)


def _probability(value: Any) -> float:
    value = _positive(value, "sampling_probability")
    if value > 1:
        raise ValueError(f"sampling_probability must be in (0, 1], not {value!r}")
    return value

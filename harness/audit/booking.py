"""Does the ledger say what a run did, and what its plan said it would do?"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dpft.harness.audit.observe import Observation
from dpft.harness.privacy import units
from dpft.harness.privacy.samplings import of_event

CLOSE = 1e-9  # relative: of noise multipliers that are the same but for rounding


@dataclass(frozen=True)
class Booking:
    """Counts that must agree. A release that is booked and not made stays paid for.

    Attributes:
        planned, taken, booked: steps.
        releases, releases_booked: made by the mechanism and booked.
        missing: names that were released more often than booked.
        batches: drawn.
        twice, strangers: the first step in which an example was looked at more than once in a pass, and in which others were
            than were sampled, or None.
        undeclared: the first step whose booked releases are not, in names and shares, those that the method declares; or None.
        unplanned: whether the ledger holds another rate or noise multiplier than the plan.
    """

    planned: int
    taken: int
    booked: int
    releases: int
    releases_booked: int
    missing: tuple[str, ...]
    batches: int
    twice: int | None
    strangers: int | None
    undeclared: int | None
    unplanned: bool

    @property
    def violations(self) -> list[str]:
        unbooked = self.releases > self.releases_booked or self.missing
        return [
            *["releases that are not booked"] * bool(unbooked),
            *["releases booked are not the declared ones"] * (self.undeclared is not None),
            *["batches that are not booked"] * (self.batches != self.booked),
            *["steps taken are not the planned ones"] * (self.taken != self.planned),
            *["the ledger is not the certified plan"] * (self.unplanned or self.booked != self.planned),
            *["an example is in a batch twice"] * (self.twice is not None),
            *["other examples are trained than were sampled"] * (self.strangers is not None),
        ]


def booking_of(seen: Observation) -> Booking:
    """Compare what was heard of a run with its ledger, and that with the plan."""
    twice, booked = (seen.times > 1).any(1), Counter()
    for event in seen.events:
        for release in event["releases"]:
            booked[release["name"]] += event["step_to"] - event["step_from"]
    planned = [
        math.isclose(event["noise_multiplier"], seen.privacy.noise_multiplier, rel_tol=CLOSE)
        and event["sampling_probability"] == seen.privacy.probability
        and of_event(event) == seen.privacy.sampling
        and of_event(event).kind == units.sampling_of(*(getattr(seen.spec, key) for key in units.SETTINGS))
        for event in seen.events
    ]
    return Booking(
        planned=seen.spec.steps,
        taken=seen.steps,
        booked=seen.events[-1]["step_to"],
        releases=seen.releases,
        releases_booked=booked.total(),
        missing=tuple(sorted(name for name, number in seen.names.items() if number > booked[name])),
        batches=seen.batches,
        twice=int(twice.argmax()) if twice.any() else None,
        strangers=seen.strangers,
        undeclared=_undeclared(seen),
        unplanned=not all(planned),
    )


def _undeclared(seen: Observation) -> int | None:
    sigma = seen.privacy.noise_multiplier
    for event in seen.events:
        own = {release["name"]: release["noise_multiplier"] for release in event["releases"]}
        for step in range(event["step_from"], min(event["step_to"], len(seen.declared))):
            if not _same(own, {name: sigma / share**0.5 for name, share in seen.declared[step].items()}):
                return step
    return None


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(math.isclose(one[name], other[name], rel_tol=CLOSE) for name in one)

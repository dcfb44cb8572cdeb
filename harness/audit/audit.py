"""One audit: a run with its noise, its replay, neighbouring batches without noise; checks, bound and verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from dpft.harness.audit import batch_checks, bounds
from dpft.harness.audit.alarms import LEVEL, Check, alarms
from dpft.harness.audit.all_checks import run_checks
from dpft.harness.audit.booking import Booking, booking_of
from dpft.harness.audit.observe import observe
from dpft.harness.audit.replayed import Replay, replay
from dpft.harness.audit.sensitivity import MATCH, ROUNDING, Sensitivity, sensitivity
from dpft.harness.audit.subject import MOST, Question
from dpft.harness.errors import BadInput, Diverged
from dpft.harness.privacy import certify


@dataclass(frozen=True)
class Audit:
    """certificate: upper epsilon of what was booked; bound: what the run shows at 95%; reachable: what it shows
    of a correct method whose averages come out exactly as expected.

    violations: what is wrong, in words.
    """

    question: Question
    certificate: float
    noise_multiplier: float
    bound: bounds.Bound
    reachable: bounds.Bound
    checks: list[Check]
    alarms: list[str]
    sensitivity: Sensitivity
    replay: Replay
    booking: Booking
    phases: int
    violations: list[str]

    @property
    def verdict(self) -> str:
        return "consistent" if not self.violations else "VIOLATION: " + "; ".join(self.violations)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        found = asdict(self) | {"verdict": self.verdict, "confidence": bounds.CONFIDENCE, "family_level": LEVEL}
        for key in ("bound", "reachable"):
            sigma = found[key]["noise_multiplier"]
            found[key]["noise_multiplier"] = sigma if sigma < 1e6 else None
        return found


def audit(question: Question, progress: Callable[[str, int, int], None] = lambda what, done, of: None) -> Audit:
    """Audit a method as it really runs. Raises BadInput for what cannot be audited."""
    if not question.canaries <= MOST:
        raise BadInput(f"This audit takes at most {MOST} canaries, not {question.canaries}; take fewer, or --one-run.")
    try:
        seen = observe(question, lambda done, of: progress("training", done, of))
        replayed, redrawn = replay(question, seen, lambda done: progress("replay", done, seen.steps))
        moved = sensitivity(question, seen)
    except Diverged as problem:
        raise BadInput(f"The audited run diverged ({str(problem).rstrip('.')}), so it shows nothing.") from None
    progress("accounting", 0, 1)
    certificate = _certified(json.dumps(seen.events), seen.spec.delta, seen.spec.epsilon, seen.spec.noise_stream)
    if certificate["epsilon"] is None:
        raise BadInput(f"The run has no certificate to audit: {certificate['error']}")
    bound, checks, booking = bounds.measured(seen), run_checks(seen, redrawn.sums), booking_of(seen)
    upper, rung = certificate["epsilon"][2], alarms(checks)
    violations = [
        *["bound exceeds certificate"] * (bound.epsilon > upper),
        *(check.violation for check in rung),
        *booking.violations,
        *sensitivity_violations(moved, replayed),
        *[f"{replayed.held} do not follow from the releases"] * (replayed.departed is not None),
    ]
    progress("accounting", 1, 1)
    return Audit(
        question=question,
        certificate=upper,
        noise_multiplier=float(seen.noise_multiplier.mean()),
        bound=bound,
        reachable=bounds.within_reach(seen),
        checks=checks,
        alarms=[check.name for check in rung],
        sensitivity=moved,
        replay=replayed,
        booking=booking,
        phases=int(seen.phases.max()) + 1,
        violations=list(dict.fromkeys(violations)),
    )


def sensitivity_violations(moved: Sensitivity, replayed: Replay) -> list[str]:
    """What neighbouring batches show; none to compare is a fault unless the run cannot be replayed, which is one already."""
    return [
        *["no neighbouring batches can be compared"] * (moved.pairs == 0 and replayed.departed is None),
        *[batch_checks.FAR] * (moved.worst > 1 + ROUNDING),
        *[batch_checks.UNLIKE] * (moved.off > MATCH),
    ]


@lru_cache(maxsize=64)
def _certified(events: str, delta: float, target: float, noise_stream: int) -> dict[str, Any]:
    """`certify`, once for all audits of one ledger."""
    return certify(json.loads(events), delta, target, noise_stream)

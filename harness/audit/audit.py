"""One audit: a run with its noise, its replay, neighbouring batches without noise; checks, bound and verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dpft.harness.audit import bounds
from dpft.harness.audit.checks import LEVEL, Check, alarms, run_checks
from dpft.harness.audit.observe import observe
from dpft.harness.audit.sensitivity import ROUNDING, Sensitivity, sensitivity
from dpft.harness.audit.subject import MOST, Question
from dpft.harness.errors import BadInput, Diverged
from dpft.harness.privacy import certify


@dataclass(frozen=True)
class Audit:
    """certificate: upper epsilon of what was booked; bound: what the run shows at 95%; reachable: what it shows
    of a correct method whose averages come out exactly as expected.

    departed: the first step whose weights did not follow from the releases, or None; unbooked: releases made less those booked;
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
    replayed: int
    departed: int | None
    unbooked: int
    violations: list[str]

    @property
    def sensitivity_rang(self) -> bool:
        """Whether an example moves a sum further than rounding allows."""
        return self.sensitivity.worst > 1 + ROUNDING

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
        seen = observe(question, lambda done, of: progress("training and replay", done, of))
        moved = sensitivity(question, seen.spec, seen.privacy)
    except Diverged as problem:
        raise BadInput(f"The audited run diverged ({str(problem).rstrip('.')}), so it shows nothing.") from None
    progress("accounting", 0, 1)
    certificate = certify(seen.events, seen.spec.delta, seen.spec.epsilon)
    if certificate["epsilon"] is None:
        raise BadInput(f"The run has no certificate to audit: {certificate['error']}")
    bound, checks = bounds.measured(seen), run_checks(seen)
    upper, rung = certificate["epsilon"][2], alarms(checks)
    everywhere = seen.places < 0
    reach = bounds.reachable(
        seen.spec.steps,
        seen.spec.delta,
        seen.spec.epsilon,
        seen.sampling_probability,
        float(seen.noise_multiplier.mean()),
        int(everywhere.sum()),
        len(set(seen.places.tolist())),
    )
    unbooked = seen.releases - seen.events[-1]["step_to"]
    violations = [
        *["bound exceeds certificate"] * (bound.epsilon > upper),
        *(check.violation for check in rung),
        *["releases that are not booked"] * (unbooked != 0),
        *["sensitivity exceeds the clip norm"] * (moved.worst > 1 + ROUNDING),
        *["weights do not follow from the releases"] * (seen.departed is not None),
    ]
    progress("accounting", 1, 1)
    return Audit(
        question=question,
        certificate=upper,
        noise_multiplier=float(seen.noise_multiplier.mean()),
        bound=bound,
        reachable=reach,
        checks=checks,
        alarms=[check.name for check in rung],
        sensitivity=moved,
        replayed=seen.replayed,
        departed=seen.departed,
        unbooked=unbooked,
        violations=list(dict.fromkeys(violations)),
    )

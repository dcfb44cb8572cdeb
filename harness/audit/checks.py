"""All checks with p-values of what a run showed, and which of them alarm."""

from __future__ import annotations

from dataclasses import dataclass

from dpft.harness.audit.observe import Observation

LEVEL = 0.005  # of all p-values together; p-values are a little rough, and one audit in a hundred is all that may alarm wrongly


@dataclass(frozen=True)
class Check:
    """One statistic: its p-value if the run does what it was certified for, and what it means when that is tiny."""

    name: str
    observed: float
    expected: float
    p_value: float
    violation: str


def run_checks(seen: Observation) -> list[Check]:
    """All checks; an alarm is a p-value under LEVEL / number of checks (Bonferroni)."""
    from dpft.harness.audit import batch_checks, noise_checks

    return [*noise_checks.checks(seen), *batch_checks.checks(seen)]


def alarms(checks: list[Check]) -> list[Check]:
    """Those whose p-value is too small for chance at the family's LEVEL."""
    return [check for check in checks if check.p_value < LEVEL / len(checks)]

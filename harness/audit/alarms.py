"""One check of what a run showed, by its p-value, and when it alarms."""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.005  # of all p-values together; p-values are a little rough, and one audit in a hundred is all that may alarm wrongly


@dataclass(frozen=True)
class Check:
    """One statistic: its p-value if the run does what it was certified for, and what it means when that is tiny."""

    name: str
    observed: float
    expected: float
    p_value: float
    violation: str


def alarms(checks: list[Check]) -> list[Check]:
    """Those whose p-value is too small for chance at the family's LEVEL: under LEVEL / number of checks (Bonferroni)."""
    return [check for check in checks if check.p_value < LEVEL / len(checks)]

"""Audits of correct methods, again and again with seeds of their own: do they alarm as rarely as stated, are p-values valid?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy import stats

from dpft.harness.audit.alarms import LEVEL
from dpft.harness.audit.audit import Audit, audit
from dpft.harness.audit.subject import Question

CONFIDENCE = 0.95
LOW = 0.05  # p-values under it are counted: no more than this share of them may be
REFUTED = 0.01  # of the tests of validity together


@dataclass(frozen=True)
class Tally:
    """One check over all audits. alarms, low: p-values under the alarm level and under LOW; least: the smallest; valid: p-value
    of their being stochastically no smaller than uniform (Kolmogorov-Smirnov, one-sided)."""

    name: str
    alarms: int
    low: int
    least: float
    valid: float


@dataclass(frozen=True)
class Repeated:
    """audits made, those accused, Clopper-Pearson limits of the rate at CONFIDENCE; accused: (method, seed, verdict) of each."""

    audits: int
    accused: list[tuple[str, int, str]]
    low: float
    high: float
    checks: list[Tally]

    @property
    def as_stated(self) -> bool:
        """Nothing contradicts the stated level, nor that p-values are valid."""
        return self.low <= LEVEL and all(one.valid >= REFUTED / len(self.checks) for one in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self) | {"level": LEVEL, "confidence": CONFIDENCE, "as_stated": self.as_stated}


def questions(first: Question, methods: Sequence[str], times: int) -> Iterator[Question]:
    """`times` audits of each method, no two with the same seed: methods share the batches of a seed."""
    for number, method in enumerate(methods):
        for again in range(times):
            yield replace(first, method=method, seed=first.seed + number * times + again)


def repeated(
    first: Question, methods: Sequence[str], times: int, progress: Callable[[Question, Audit], None]
) -> Repeated:
    """Make all audits, one after the other. Raises BadInput for what cannot be audited."""
    found = []
    for question in questions(first, methods, times):
        found.append(audit(question))
        progress(question, found[-1])
    accused = [(one.question.method, one.question.seed, one.verdict) for one in found if one.violations]
    return Repeated(len(found), accused, *limits(len(accused), len(found)), tallies(found))


def limits(events: int, of: int) -> tuple[float, float]:
    """Clopper-Pearson limits of a rate at CONFIDENCE."""
    found = stats.binomtest(events, of).proportion_ci(CONFIDENCE, "exact")
    return float(found.low), float(found.high)


def tallies(found: Sequence[Audit]) -> list[Tally]:
    """One for every check."""
    rows = []
    for number, check in enumerate(found[0].checks):
        values = [float(one.checks[number].p_value) for one in found]
        rows.append(
            Tally(
                check.name,
                sum(check.name in one.alarms for one in found),
                sum(value < LOW for value in values),
                min(values),
                float(stats.kstest(values, "uniform", alternative="greater").pvalue),
            )
        )
    return rows

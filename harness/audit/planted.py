"""Audits of planted bugs: does each ring, and is the code as it is left alone?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpft.harness.audit.audit import Audit, audit
from dpft.harness.audit.bugs import BUGS, Bug
from dpft.harness.audit.subject import Question
from dpft.harness.errors import unknown


@dataclass(frozen=True)
class Row:
    """One line of the table; caught: the bug's own violation was found, or without a bug none."""

    name: str
    about: str
    audit: Audit
    caught: bool


def choose(names: str | None) -> list[Bug]:
    """The bugs called `names`, separated by commas; None: all. Raises BadInput for an unknown one."""
    known = {bug.name: bug for bug in BUGS}
    chosen = [part.strip() for part in names.split(",")] if names is not None else list(known)
    for name in chosen:
        if name not in known:
            raise unknown("planted bug", name, known)
    return [known[name] for name in chosen]


def audits(question: Question, bugs: list[Bug]) -> Iterator[Row]:
    """First the code as it is, then with each bug."""
    honest = audit(question)
    yield Row("none", "nothing", honest, not honest.violations)
    for bug in bugs:
        with bug.plant():
            found = audit(replace(question, method=bug.method, changes={**question.changes, **bug.changes}))
        yield Row(bug.name, bug.about, found, bug.rings in found.violations)

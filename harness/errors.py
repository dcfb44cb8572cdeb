"""Errors a user can act on. Each message is one sentence that says what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """The question was bad: shown as one sentence without a traceback, exit code 2."""


class Diverged(Exception):
    """Training produced a non-finite loss or gradient; the run ends with status `diverged`."""


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; `number` is the signal's. Raised after a step where a run is training, else anywhere."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class RankLost(BaseException):
    """Another process of this run is gone or does not answer (harness/train/ranks.py): nothing can be agreed on any more."""


class CannotRun(BadInput):
    """This run cannot be made as asked (unsupported layer, missing data, unreachable budget): a typed status in a sweep."""


def first_line(error: Exception, otherwise: str | None = None, longest: int | None = None) -> str:
    """What an error of another library says, to stand in parentheses: its first line without a period, of at most `longest`
    characters. otherwise: what stands there where it says nothing; None: its type.
    """
    lines = str(error).strip().splitlines() or [otherwise or type(error).__name__]
    return lines[0].rstrip(".")[:longest]


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for an unknown `name`, naming the nearest match among `known`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
    return BadInput(f"There is no {kind} called {name!r}; {hint}")

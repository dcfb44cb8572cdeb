"""One bad input, and what a command must not do with it."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

LIMIT = 30.0  # seconds until a command counts as hanging


@dataclass(frozen=True)
class Case:
    """A command line, or a function that a command calls, on bad input.

    Attributes:
        border: where the input comes in.
        what: the input in words, for whoever reads a failure.
        arguments: of the command.
        call: instead of a command.
        may_accept: the input may be fine after all, so exit code 0 is no failure.
        may_say_no: exit code 1 is an answer of this command, and may be right.
    """

    border: str
    what: str
    arguments: tuple[str, ...] = ()
    call: Callable[[], object] | None = None
    may_accept: bool = False
    may_say_no: bool = False


@dataclass(frozen=True)
class Failure:
    """kind: traceback, hang, accepted, sentence (none, or not one), code (an exit code that means something else)."""

    case: Case
    kind: str
    detail: str


class Hangs(BaseException):
    """The time is up; no handler of the code under test may catch it."""


class Accepted(BaseException):
    """Bad input was taken, and work would now begin."""


class Told(io.StringIO):
    """Stderr, which ends the case where a run or a trace begins: nothing is trained here."""

    def write(self, text: str) -> int:
        if text.startswith(("tracing ", "[1/")):
            raise Accepted(text)
        return super().write(text)


def failure(case: Case) -> Failure | None:
    """What the command did wrong with the case; None where it said in one sentence what is wrong, or answered."""
    code, out, err, raised = _outcome(case)
    if raised is not None:
        if isinstance(raised, Hangs):
            return Failure(case, "hang", f"after {LIMIT:g} s")
        if isinstance(raised, Accepted):
            return None if case.may_accept else Failure(case, "accepted", str(raised))
        where = traceback.extract_tb(raised.__traceback__)[-1]
        place = f"{where.filename.rpartition('/dpft/')[2] or where.filename}:{where.lineno}"
        return Failure(case, "traceback", f"{type(raised).__name__} at {place}: {raised}"[:300])
    if code == 70:
        return Failure(case, "traceback", err.strip()[:300])
    if code == 0:
        return None if case.may_accept else Failure(case, "accepted", out.strip()[:200])
    if code == 1:
        return None if case.may_say_no else Failure(case, "code", f"exit code 1: {err.strip()[:300]}")
    if code != 2:
        return Failure(case, "code", f"exit code {code}: {err.strip()[:300]}")
    if case.may_say_no and out.strip() and not err.strip():
        return None  # a table that says what cannot be told
    said = [line for line in err.splitlines() if line.startswith(("dpft: ", "Error: "))]
    control = any(ord(character) < 32 or ord(character) == 127 for character in err.replace("\n", ""))
    if len(said) != 1 or not said[0].endswith((".", ".)", "?")) or "Traceback" in err or control or len(said[0]) > 2000:
        return Failure(case, "sentence", err.strip()[:300])
    return None


def _outcome(case: Case) -> tuple[int | None, str, str, BaseException | None]:
    """(exit code, stdout, stderr, the exception that a user would see as a traceback or None)."""
    from dpft.harness import cli
    from dpft.harness.cli.ending import ended

    out, err, argv = io.StringIO(), Told(), sys.argv
    sys.argv = ["dpft", *case.arguments]

    def stop(number, frame):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if case.call is not None:
                return ended(case.call), out.getvalue(), err.getvalue(), None
            cli.main()
    except SystemExit as end:
        return (
            (end.code if isinstance(end.code, int) else 0 if end.code is None else 1),
            out.getvalue(),
            err.getvalue(),
            None,
        )
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt):
            raise
        return None, out.getvalue(), err.getvalue(), raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    return 0, out.getvalue(), err.getvalue(), None

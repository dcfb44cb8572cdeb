"""SIGINT and SIGTERM: a run that trains ends after its step, with a checkpoint; whatever else is going on ends at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen
from typing import Any

from dpft.harness.errors import Interrupted

GRACE = 5.0  # seconds that the step in flight is waited for
AGAIN = 0.01  # seconds until Interrupted is raised again, where it was lost
ONE = 1.0  # seconds within which several signals are one: a terminal and a scheduler tell whole groups of processes


class _Asked:
    """Of this process: which signal came, when, whether a step is being waited for, and who else is to be told."""

    number: int | None = None
    at = 0.0
    training = False
    others: list[Popen] = []


@contextmanager
def handled() -> Iterator[None]:
    """Inside: SIGINT and SIGTERM raise Interrupted; a second one, a second later, does so in the middle of a step too.

    A signal that the process was started to ignore (nohup) stays ignored. Only the main thread can do this; in others nothing
    changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {signal.SIGINT: _ask, signal.SIGTERM: _ask, signal.SIGALRM: _too_late}
    before = {number: signal.getsignal(number) for number in ours}
    for number, handler in ours.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    _Asked.number = None
    try:
        with _not_lost():
            yield
    finally:
        _stop_waiting()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _not_lost() -> Iterator[None]:
    """Inside: Interrupted is raised again where it was in a destructor, of which Python prints what they raise, and goes on."""
    before = sys.unraisablehook

    def unraisable(what: Any) -> None:
        if isinstance(what.exc_value, Interrupted):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            before(what)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def between_steps(everyones: Callable[[int], list[int]] = lambda number: [number]) -> Iterator[Callable[[Any], Any]]:
    """Around one run: gives a function that wraps its observer, so that Interrupted is raised after a step, and else at the end.

    A step that takes longer than GRACE is not waited for. everyones: told which signal has come here (0: none), says what came
    to the other processes that share the run, so that all end after the same step.
    """

    def pausing(observe: Callable[..., None]) -> Callable[..., None]:
        def observed(*arguments: Any) -> None:
            observe(*arguments)
            if number := max(everyones(_Asked.number or 0)):
                _Asked.number = number
                end()
            _Asked.training = True

        return observed

    try:
        yield pausing
        end()
    finally:
        _stop_waiting()


@contextmanager
def kept() -> Iterator[None]:
    """Inside, a library may set handlers of its own (ray does); afterwards those of `handled` are back."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def told_too(others: list[Popen]) -> Iterator[None]:
    """Inside: `others`, processes of this command, get a SIGTERM when this one is interrupted, before it has ended its step."""
    _Asked.others = others
    try:
        yield
    finally:
        _Asked.others = []


def asked() -> bool:
    """Whether a signal has come."""
    return _Asked.number is not None


def _ask(number: int, frame: Any) -> None:
    again = _Asked.number is not None
    if again and time.monotonic() - _Asked.at < ONE:
        return
    _Asked.number, _Asked.at = number, time.monotonic()
    for other in _Asked.others:
        with suppress(ProcessLookupError):
            other.terminate()
    if again or not _Asked.training:
        raise Interrupted(number)
    signal.setitimer(signal.ITIMER_REAL, GRACE)


def _too_late(number: int, frame: Any) -> None:
    if _Asked.number is not None:
        raise Interrupted(_Asked.number)


def _stop_waiting() -> None:
    _Asked.training = False
    signal.setitimer(signal.ITIMER_REAL, 0)


def end() -> None:
    """Raise Interrupted where a signal has come."""
    if _Asked.number is not None:
        _stop_waiting()
        raise Interrupted(_Asked.number)

"""A signal in a destructor, where Python prints what is raised and goes on."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, time, weakref
from dpft.harness.errors import Interrupted
from dpft.harness.execution import interrupts


class Whole:
    pass


class Slow:
    def __del__(self):
        signalled()


def signalled():
    os.kill(os.getpid(), {number})
    time.sleep(0.2)


def callback():
    there = Whole()
    reference = weakref.ref(there, lambda _: signalled())
    del there


with interrupts.handled():
    try:
        {destroyed}()
        if {lasting}:
            time.sleep(20)
    except Interrupted as stop:
        sys.exit(128 + stop.number)
time.sleep(0.3)
print("left", flush=True)
"""


@pytest.mark.parametrize("destroyed", ["Slow", "callback"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_comes_while_something_is_destroyed_is_not_lost(number, destroyed):
    assert ran(number, destroyed, True) == (128 + number, "", "")


def test_what_was_not_raised_again_before_the_end_does_no_harm_after_it():
    assert ran(signal.SIGTERM, "Slow", False) in ((0, "left\n", ""), (143, "", ""))


def ran(number: int, destroyed: str, lasting: bool) -> tuple[int, str, str]:
    script = SCRIPT.format(number=int(number), destroyed=destroyed, lasting=lasting)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    return found.returncode, found.stdout, found.stderr

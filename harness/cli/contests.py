"""`dpft run` and `dpft plan` of a leaderboard."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from dpft.harness.errors import BadInput

UNITS = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}


def is_board(name: str | None) -> bool:
    """Whether `name` is a leaderboard and no suite."""
    from dpft.harness.leaderboard import board

    return name in board.boards()


def seconds_of(text: str | None) -> float:
    """`3h`, `90m`, `45min` or `20s` in seconds; None is endless. Raises BadInput for anything else."""
    if text is None:
        return math.inf
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(h|m|min|s)", text.strip())
    if not found or not float(found[1]) > 0:
        raise BadInput(f"--budget {text!r} is no time; write for example 3h or 90m.")
    return float(found[1]) * UNITS[found[2]]


def run(board, look, make, end: float) -> bool:
    """Make what `board` wants until `end` (seconds since the epoch), by make(specs, up); whether it is finished."""
    from dpft.harness.leaderboard import driver

    def up() -> bool:
        return time.time() >= end

    return driver.run(board, look, lambda specs: make(specs, up), up)


def text(board, look) -> str:
    """What is decided so far."""
    from dpft.harness.report import leaderboards as verdicts
    from dpft.harness.report.text import markdown

    return markdown(verdicts.parts(board, look))


def failed(board, look) -> int:
    """How many of the runs that were made have no result."""
    from dpft.harness.leaderboard import state

    return sum(state.failures(contest, board.rules, look) for contest in board.contests)


def plan(name: str, overrides: dict[str, Any], store) -> list[dict[str, Any]]:
    """A row for each contest: runs made, wanted now, the most that can be wanted, and hours by records of like runs."""
    from dpft.harness.leaderboard import board, driver, hours

    return hours.rows(board.load(name, overrides), store, driver.looking(store))

"""What a leaderboard will take."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

from dpft.harness.leaderboard.board import Arm, Board
from dpft.harness.leaderboard.state import Look, standings
from dpft.harness.records.store import Store


def rows(board: Board, store: Store, look: Look) -> list[dict[str, Any]]:
    """One for each contest: runs that are made, the least and the most that are still wanted, hours of one job for these.

    Hours are means over records of the same task, model, steps and batch size, of the same method where there are such, else of
    any; None where there are none.
    """
    seconds = _seconds(store)
    found = []
    for contest in board.contests:
        made = least = most = 0
        times: list[tuple[float, float]] = []
        for one in standings(contest, board.rules, look):
            tried = sum(len(scores) for _, scores in one.tuning.scores)
            trying = 0 if one.tuning.chosen is not None else sum(board.rules.rounds(one.arm.trials)) - tried
            fewest, greatest = board.rules.seeds
            done = len(one.records)
            settled = one.arm.control or (one.verdict is not None and one.verdict.verdict != "undecided")
            low = trying + max(0, fewest - done)
            high = low if settled else trying + greatest - done
            made, least, most = made + tried + done, least + low, most + high
            each = _each(one.arm, seconds)
            times.append((math.nan, math.nan) if each is None else (low * each, high * each))
        hours = [round(sum(column) / 3600, 1) for column in zip(*times, strict=True)]
        known = not any(map(math.isnan, hours))
        found.append(
            {
                "contest": contest.title,
                "arms": len(contest.arms),
                "made": made,
                "left, at least": least,
                "at most": most,
                "hours of one job": f"{hours[0]} to {hours[1]}" if known else None,
            }
        )
    return found


SAME = ("task", "model", "max_length", "steps", "batch_size")


def _seconds(store: Store) -> dict[tuple, dict[str, list[float]]]:
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in store.sound(store.summary) if store.folder.is_dir() else ():
        if record["status"] == "done":
            spec = record["spec"]
            found[tuple(spec[key] for key in SAME)][spec["method"]].append(record["cost"]["total_s"])
    return found


def _each(arm: Arm, seconds: dict[tuple, dict[str, list[float]]]) -> float | None:
    spec = arm.tested({}, 0)
    alike = seconds.get(tuple(getattr(spec, key) for key in SAME))
    if not alike:
        return None
    return statistics.fmean(alike.get(spec.method) or [value for values in alike.values() for value in values])

"""Makes a leaderboard's runs: whatever its records still want, until nothing is wanted or the time is up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpft.harness.leaderboard.board import Board
from dpft.harness.leaderboard.state import Look, wanted
from dpft.harness.records.store import Store
from dpft.harness.runs.spec import RunSpec


def looking(store: Store) -> Look:
    """Reads the records of a store, each once: a record that is there does not change while a board is made."""
    kept: dict[str, dict[str, Any]] = {}

    def look(spec: RunSpec) -> dict[str, Any] | None:
        if spec.run_id not in kept:
            record = store.summary(spec.run_id)
            if record is None:
                return None
            kept[spec.run_id] = {
                key: record[key] for key in ("run_id", "status", "spec", "result", "cost", "privacy", "error")
            }
        return kept[spec.run_id]

    return look


def run(board: Board, look: Look, make: Callable[[list[RunSpec]], None], up: Callable[[], bool]) -> bool:
    """Make what is wanted, in rounds, by `make`, which stops early where the time is `up`; whether the board is finished.

    Any number of processes may do so at once on one store: each computes the same wants from the same records.
    """
    while todo := wanted(board, look):
        if up():
            return False
        make(todo)
    return True

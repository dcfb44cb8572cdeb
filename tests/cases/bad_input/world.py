"""What the bad input is made of: real records, a suite, a mirror, a baseline, and a folder that each case may fill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RECORDS = ("zeroth/029e085d64f3d2ef", "zeroth/62dffc0e255010af", "official/500ea459772969e9", "theory/074767950427dcde")
SUITE = {
    "small": {
        "description": "two arms",
        "base": {"task": "low-rank", "model": "linear", "batch_size": 64, "steps": 2, "seed": [0, 1]},
        "arms": [{"method": "non-private", "lr": [1e-3, 1e-2]}, {"method": "non-private", "optimizer": "sgd"}],
    }
}
PREDICTION = {
    "says": "one is better",
    "source": "a paper",
    "row": {"method": "dp-zo"},
    "against": [{"method": "dp-sgd"}],
    "expect": "better",
    "margin": 0.01,
    "task": "low-rank",
}
BOARD = {
    "small": {
        "description": "a board",
        "rules": {
            "trials": 1,
            "tuning_seeds": 1,
            "seeds": [2, 3],
            "block": 1,
            "margin": 0.01,
            "baseline": "non-private",
        },
        "contests": [
            {
                "title": "one",
                "base": {"task": "low-rank", "model": "linear", "batch_size": 64, "steps": [2, 3]},
                "arms": [{"method": ["non-private"]}, {"method": "noise-only", "name": "other", "trials": 1}],
            }
        ],
    }
}


class World:
    """`folder` is emptied before each case; `results` has records that are fine."""

    def __init__(self, root: Path):
        from dpft.harness.records.store import Store
        from dpft.harness.records.verifying import verify_folder
        from dpft.harness.regression import baseline

        self.folder, self.results, self.blessed = root / "case", root / "results", root / "baseline.json"
        self.results.mkdir()
        for name in RECORDS:
            study, _, run_id = name.partition("/")
            packed = Store(ROOT / "results" / study)
            (self.results / f"{run_id}.json").write_bytes(packed.text(run_id))
            packed.curve(run_id).write_parquet(self.results / f"{run_id}.parquet")
        baseline.bless(self.blessed, Store(self.results).each())
        verify_folder(self.results)  # what it computes is kept for the cases

    def clear(self) -> None:
        """An empty `folder`, and the predictions and leaderboards of the package."""

        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.predict(packaged("predictions.toml"))
        self.contest(packaged("boards.toml"))

    def predict(self, path: Any) -> None:
        """Predictions come from `path` until `clear`."""
        from dpft.harness.report import predictions

        predictions.FILE = path
        predictions.predictions.cache_clear()

    def contest(self, path: Any) -> None:
        """Leaderboards come from `path` until `clear`."""
        from dpft.harness.leaderboard import board

        board.FILE = path
        board.boards.cache_clear()

    def copied(self) -> Path:
        """A folder of records that a case may spoil."""
        return shutil.copytree(self.results, self.folder / "results")

    def record(self, number: int) -> Path:
        """The path of a record in `results`."""
        return sorted(self.results.glob("*.json"))[number % len(RECORDS)]


def packaged(name: str) -> Any:
    from importlib.resources import files

    return files("dpft.tasks") / name


def toml(value: Any) -> str:
    """A value as TOML, tables inline; what TOML cannot say (null, a number too large) becomes another wrong value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return '"\\u0000"' if value is None else json.dumps(value)


def document(tables: dict[str, Any]) -> str:
    """A TOML file, its top level one key a line."""
    return "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in tables.items())

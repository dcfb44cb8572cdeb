"""Records -> rows: one configuration with its seeds; groups of rows that may be compared; the best learning rate of each."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from dpft.harness import registry
from dpft.harness.privacy import matched

BASELINES = ("dp-sgd", "dp-adam")  # the target of steps-to-threshold is the best of these, as SPECTRAL.md's rule says
SETTING = ("task", "task_version", "model", "head", "max_length")


@dataclass(frozen=True)
class Row:
    """One configuration: the records of its seeds."""

    spec: dict[str, Any]
    records: list[dict[str, Any]]
    grid: tuple[float, ...] = ()  # the learning rates of which this row has the best

    @property
    def method(self) -> str:
        return self.spec["method"]

    @property
    def private(self) -> bool:
        return self.spec["epsilon"] is not None

    @property
    def ranked(self) -> bool:
        """Whether this row competes: private, and not a control. A method this dpft does not know competes."""
        known = registry.methods().get(self.method)
        return self.private and not (known is not None and known.control)

    @property
    def baseline(self) -> bool:
        """Whether others are measured against this row."""
        return self.ranked and self.method in BASELINES and self.spec["decoder"] == "mean"

    @property
    def final(self) -> float:
        return statistics.mean(r["result"]["final"] for r in self.records)


def groups(records: list[dict[str, Any]]) -> list[list[Row]]:
    cells: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        cells[json.dumps({**record["spec"], "seed": None}, sort_keys=True)].append(record)
    rows = [Row(group[0]["spec"], sorted(group, key=lambda r: r["spec"]["seed"])) for group in cells.values()]
    settings: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        settings[tuple(row.spec[key] for key in SETTING)].append(row)
    found = []
    for _, members in sorted(settings.items(), key=lambda item: [str(v) for v in item[0]]):
        budgets = sorted({row.spec["epsilon"] for row in members if row.private}) or [None]
        controls = [row for row in members if not row.private]
        found += [[row for row in members if row.private and row.spec["epsilon"] == b] + controls for b in budgets]
    return found


def ordered(rows: list[Row]) -> list[Row]:
    """Best first, controls last."""
    sign = 1 if rows[0].records[0]["result"]["higher_is_better"] else -1
    return sorted(rows, key=lambda row: (row.ranked, sign * row.final), reverse=True)


def best_rates(rows: list[Row]) -> list[Row]:
    """Of rows that differ in the learning rate alone, the one with the best mean; baselines keep all theirs.

    A method whose steps come out longer at equal lr must be compared with the baseline at a larger one, too.
    """
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        alike[json.dumps({**row.spec, "lr": None, "seed": None}, sort_keys=True)].append(row)
    kept = []
    for grid in alike.values():
        if len(grid) == 1 or grid[0].baseline:
            kept += grid
        else:
            seeds = max(len(row.records) for row in grid)  # a rate that has seen fewer seeds is not finished
            best = ordered([row for row in grid if len(row.records) == seeds])[0]
            kept.append(Row(best.spec, best.records, tuple(sorted(row.spec["lr"] for row in grid))))
    return kept


def places(rows: list[Row]) -> tuple[list[int | None], str | None]:
    """The rank of each of the `ordered` rows of one group, None where it has none, and why nothing is ranked (or None)."""
    private = [row for row in rows if row.private]
    named = [(name_of(row, rows), r["privacy"]) for row in private for r in row.records]
    reason = matched([privacy for _, privacy in named], [name for name, _ in named]) if private else None
    ranks = itertools.count(1)
    return [next(ranks) if row.ranked and reason is None else None for row in rows], reason


def name_of(row: Row, rows: list[Row]) -> str:
    """The method, with the settings that tell its rows in this table apart."""
    same = [other.spec for other in rows if other.method == row.method]
    varying = [key for key in row.spec if key not in ("seed", "options") and any(s[key] != row.spec[key] for s in same)]
    own = row.spec["options"]
    varying += [key for key in own if any(s["options"].get(key) != own[key] for s in same)]
    if row.grid and "lr" not in varying:
        varying.append("lr")
    if not varying:
        return row.method
    return f"{row.method} ({', '.join(f'{key}={own.get(key, row.spec.get(key))}' for key in varying)})"

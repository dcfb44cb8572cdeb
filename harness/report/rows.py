"""Records -> rows: one configuration with its seeds; groups of rows that may be compared; the best learning rate of each."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpft.harness import registry
from dpft.harness.privacy import matched

BASELINES = ("dp-sgd", "dp-adam")  # the target of steps-to-threshold is the best of these, as SPECTRAL.md's rule says
SETTING = ("task", "task_version", "task_options", "model", "head", "max_length")


@dataclass(frozen=True)
class Row:
    """One configuration: the records of its seeds."""

    spec: dict[str, Any]
    records: list[dict[str, Any]]
    grid: tuple[float, ...] = ()  # the learning rates of which this row has the best
    chosen: tuple[str, ...] = ()  # the settings that this choice was over

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

    @property
    def higher_is_better(self) -> bool:
        return self.records[0]["result"]["higher_is_better"]

    @property
    def finals(self) -> dict[int, float]:
        """Seed -> final metric."""
        return {r["spec"]["seed"]: r["result"]["final"] for r in self.records}

    @property
    def peak_bytes(self) -> float:
        """Median over seeds of the peak memory."""
        return statistics.median(sum(r["cost"]["peak_bytes"].values()) for r in self.records)

    @property
    def step_s(self) -> float | None:
        """Median over seeds of the time of a step; None where runs were too short to tell."""
        known = [r["cost"]["step_s"] for r in self.records if r["cost"]["step_s"] is not None]
        return statistics.median(known) if known else None


def groups(records: list[dict[str, Any]]) -> list[list[Row]]:
    cells: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        cells[json.dumps({**record["spec"], "seed": None}, sort_keys=True)].append(record)
    rows = [Row(group[0]["spec"], sorted(group, key=lambda r: r["spec"]["seed"])) for group in cells.values()]
    settings: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        settings[tuple(json.dumps(row.spec[key], sort_keys=True) for key in SETTING)].append(row)
    found = []
    for _, members in sorted(settings.items()):
        budgets = sorted({row.spec["epsilon"] for row in members if row.private}) or [None]
        controls = [row for row in members if not row.private]
        found += [[row for row in members if row.private and row.spec["epsilon"] == b] + controls for b in budgets]
    return found


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Best first, controls last."""
    sign = 1 if rows[0].higher_is_better else -1
    return sorted(rows, key=lambda row: (row.ranked, sign * row.final), reverse=True)


def alike(rows: Sequence[Row], free: Sequence[str] = ("lr",)) -> list[list[Row]]:
    """Rows that differ in nothing but the settings `free`, together."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[json.dumps({**row.spec, "seed": None, **dict.fromkeys(free)}, sort_keys=True)].append(row)
    return list(found.values())


def finished(rows: Sequence[Row]) -> list[Row]:
    """Of rows that are alike those with the most seeds: a rate that has seen fewer is not finished."""
    seeds = max(len(row.records) for row in rows)
    return [row for row in rows if len(row.records) == seeds]


def best_rates(rows: Sequence[Row], free: Sequence[str] = ("lr",), baselines: bool = False) -> list[Row]:
    """Of rows that differ in the learning rate (or the settings `free`) alone, the one with the best mean.

    Baselines keep all theirs unless `baselines`: a method whose steps come out longer at equal lr must be compared with the
    baseline at a larger one, too.
    """
    kept = []
    for grid in alike(rows, free):
        if len(grid) == 1 or (grid[0].baseline and not baselines):
            kept += grid
        else:
            best = ordered(finished(grid))[0]
            chosen = tuple(key for key in free if len({row.spec[key] for row in grid}) > 1)
            rates = tuple(sorted({row.spec["lr"] for row in grid}))
            kept.append(Row(best.spec, best.records, rates if "lr" in chosen else (), chosen))
    return kept


def places(rows: Sequence[Row], free: Sequence[str] = ()) -> tuple[list[int | None], str | None]:
    """The rank of each of the `ordered` rows of one group, None where it has none, and why nothing is ranked (or None).

    free: keys of the privacy section that need not be the same in all rows.
    """
    named = [
        (name, r["privacy"]) for name, row in zip(names(rows), rows, strict=True) if row.private for r in row.records
    ]
    reason = matched([privacy for _, privacy in named], [name for name, _ in named], free) if named else None
    ranks = itertools.count(1)
    return [next(ranks) if row.ranked and reason is None else None for row in rows], reason


def names(rows: Sequence[Row]) -> list[str]:
    """For each row the method, with the settings that tell its rows in this table apart."""
    values: dict[str, dict[tuple[str, str], set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for kind, settings in (("spec", row.spec), ("option", row.spec["options"])):
            for key, value in settings.items():
                values[row.method][kind, key].add(repr(value))
    options = {method: {key for kind, key in found if kind == "option"} for method, found in values.items()}
    for row in rows:  # an option that a row leaves at its default is another value
        for key in options[row.method] - row.spec["options"].keys():
            values[row.method]["option", key].add("")
    return [_name(row, values[row.method]) for row in rows]


def _name(row: Row, values: dict[tuple[str, str], set[str]]) -> str:
    own = row.spec["options"]
    varying = [key for key in row.spec if key not in ("seed", "options") and len(values["spec", key]) > 1]
    varying += [key for key in own if len(values["option", key]) > 1]
    varying += [key for key in row.chosen if key not in varying]
    if not varying:
        return row.method
    return f"{row.method} ({', '.join(f'{key}={own.get(key, row.spec.get(key))}' for key in varying)})"


def name_of(row: Row, rows: Sequence[Row]) -> str:
    """The name of one of `rows`; `names` has all of them in one go."""
    return next(name for name, other in zip(names(rows), rows, strict=True) if other is row)

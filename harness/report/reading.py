"""What a report reads of a results folder: records without their bulk, and the evaluations of all curves in one scan."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpft.harness.border.files import trouble
from dpft.harness.records.schema import bulk
from dpft.harness.records.store import Store
from dpft.harness.report.rows import Row
from dpft.harness.statistics import Reached, median_reached, to_threshold
from dpft.harness.statistics.thresholds import FEWEST

COLUMNS = ("step", "metric", "epsilon", "alignment_noisy", "alignment_decoded")


def summaries(store: Store) -> list[dict[str, Any]]:
    """All records, by run id, without the diagnostics per matrix. Raises BadInput like `Store.records`."""
    return list(store.sound(store.summary))


def diagnostics(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    """All diagnostics of a run of `store`; the record may be a summary."""
    return bulk(store.whole(record))


def spikes(store: Store, record: dict[str, Any]) -> list[int]:
    """How many singular values survived, of every matrix and evaluated step of a run."""
    steps = diagnostics(store, record).get("decoder_by_parameter", [])  # which the oldest records lack
    seen = [one for step in steps for one in step.values() if isinstance(one, dict)]
    return [one["spikes"] for one in seen if one.get("spikes") is not None]


@dataclass(frozen=True)
class Target:
    """value of the metric to be reached, on the `examples` of the validation split (None: all) that curves are measured on."""

    value: float
    examples: int | None


class Curves:
    """The evaluations of runs, read at once when first asked for. Raises BadInput, naming the file, for a damaged one."""

    def __init__(self, store: Store, records: Iterable[dict[str, Any]]):
        self._store = store
        self._run_ids = sorted({record["run_id"] for record in records})

    @functools.cached_property
    def _evaluations(self) -> dict[str, dict[str, list]]:
        return _scan(self._store, self._run_ids) if self._run_ids else {}

    def of(self, record: dict[str, Any]) -> dict[str, list]:
        """Column -> one value per evaluation; up to the step at which the record was cut, where a view did so."""
        found = self._evaluations[record["run_id"]]
        if "cut" not in record:
            return found
        kept = sum(step <= record["cut"]["step"] for step in found["step"])
        return {column: values[:kept] for column, values in found.items()}

    def end(self, row: Row) -> float | None:
        """Mean over seeds of the curve's last value; None where a run has none."""
        ends = [self.of(record)["metric"][-1:] for record in row.records]
        return statistics.mean(end[0] for end in ends) if all(ends) else None

    def reached(self, row: Row, target: Target | None) -> list[Reached | None]:
        """Where each seed of a row reaches `target`, None where it cannot be told; empty where there is no target.

        A curve on other examples than the target's tells nothing about it.
        """
        if target is None:
            return []
        if row.spec["eval_examples"] != target.examples:
            return [None] * len(row.records)
        found = []
        for record in row.records:
            curve = self.of(record)
            better = record["result"]["higher_is_better"]
            found.append(to_threshold(curve["step"], curve["metric"], curve["epsilon"], target.value, better))
        return found

    def _earliest(self, row: Row, target: Target) -> float:
        """The step before which no seed that cannot be told has reached the target: its last, if it has enough evaluations."""
        steps = [self.of(record)["step"] for record in row.records]
        told = row.spec["eval_examples"] == target.examples and all(len(one) >= FEWEST for one in steps)
        return min(one[-1] for one in steps) if told else 0.0

    def median_reached(self, row: Row, target: Target | None) -> Reached | None:
        """The upper median over seeds; None without a target, and where it cannot be told.

        It cannot where half of the seeds miss a target that their mean ends at: the row that sets a target reaches it.
        """
        found = self.reached(row, target)
        middle = median_reached(found, self._earliest(row, target)) if found else None
        if middle is None or math.isfinite(middle.step):
            return middle
        sign, end = (1 if row.higher_is_better else -1), self.end(row)
        return middle if end is None or sign * end < sign * target.value else None


def _scan(store: Store, run_ids: list[str]) -> dict[str, dict[str, list]]:
    import polars

    loose = [run_id for run_id in run_ids if store.curve_path(run_id).exists() or store.record_path(run_id).exists()]
    try:
        frames = [
            scan.group_by("run_id", maintain_order=True).agg(polars.all()).collect()
            for scan in _scans(store, run_ids, loose)
        ]
        found = {row.pop("run_id"): row for frame in frames for row in frame.iter_rows(named=True)}
    except (polars.exceptions.PolarsError, OSError):  # one of them is bad: the slow way names it
        found = {run_id: _evaluated(store.curve(run_id)) for run_id in run_ids}
    nothing: dict[str, list] = {column: [] for column in COLUMNS}
    return {run_id: found.get(run_id, nothing) for run_id in run_ids}


def _evaluated(curve) -> dict[str, list]:
    """The evaluations of one curve; what it has no column for is null."""
    rows = curve.drop_nulls("metric")
    return {name: rows[name].to_list() if name in rows.columns else [None] * rows.height for name in COLUMNS}


def _scans(store: Store, run_ids: list[str], loose: list[str]):
    """The evaluations of loose curves and of packed ones, not read yet."""
    import polars

    schema = {column: polars.Int64 if column == "step" else polars.Float64 for column in COLUMNS}
    paths = [store.curve_path(run_id) for run_id in loose]
    if bad := next((path for path in paths if trouble(path)), None):
        raise OSError(f"{bad} is no file")
    if paths:
        lazy = polars.scan_parquet(paths, schema=schema, extra_columns="ignore", include_file_paths="path")
        stem = polars.col("path").str.extract(r"([^/\\]+)\.parquet$").alias("run_id")
        yield lazy.filter(polars.col("metric").is_not_null()).select(stem, *COLUMNS)
    if len(loose) < len(run_ids) and (packed := store.packed.evaluations(COLUMNS)) is not None:
        yield packed.filter(polars.col("run_id").is_in(list(set(run_ids) - set(loose))))

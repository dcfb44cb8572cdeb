"""One line per run, for a reader's own analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.records.store import atomic
from dpft.harness.report.reading import Curves
from dpft.harness.report.tables import certified, target_of
from dpft.harness.report.views import Group, hardware

if TYPE_CHECKING:
    import polars

THRESHOLD = ("threshold", "threshold_reached", "steps_to_threshold", "epsilon_at_threshold")


def csv(records: list[dict[str, Any]], groups: list[Group], curves: Curves, public: bool, path: Path) -> None:
    """Write `frame` to `path`."""
    made = frame(records, groups, curves, public)
    with atomic(path) as temporary:
        made.write_csv(temporary)


def frame(records: list[dict[str, Any]], groups: list[Group], curves: Curves, public: bool) -> polars.DataFrame:
    """Spec, budget, result, cost and hardware of every run, failed ones too, a row each; empty where there is nothing.

    threshold, steps_to_threshold, epsilon_at_threshold: those of the run's table (`dpft report`), empty when not reached;
    threshold_reached: `yes`, `no`, or `–` where the evaluations cannot tell. verified: `no` for runs that are not ranked because
    `dpft verify` rejects them.
    """
    import polars

    reached: dict[str, dict[str, Any]] = {}
    for group in groups:
        target = target_of(group.rows, curves)
        for row in group.every:
            for record, one in zip(row.records, curves.reached(row, target), strict=bool(target)):
                there = one is not None and one.step < float("inf")
                reached[record["run_id"]] = {
                    "threshold": target.value,
                    "threshold_reached": "–" if one is None else "yes" if there else "no",
                    "steps_to_threshold": int(one.step) if there else None,
                    "epsilon_at_threshold": one.epsilon if there else None,
                }
    lines = [_line(record, reached.get(record["run_id"], {}), public) for record in records]
    return polars.DataFrame(lines, infer_schema_length=None)


def _line(record: dict[str, Any], reached: dict[str, Any], public: bool) -> dict[str, Any]:
    privacy, result, cost = (record[section] or {} for section in ("privacy", "result", "cost"))
    line = {
        "run_id": record["run_id"],
        "status": record["status"],
        **{k: json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for k, v in record["spec"].items()},
        "certified_epsilon": certified(record),
        "certified_delta": privacy.get("delta"),
        "noise_multiplier": privacy.get("noise_multiplier"),
        "sampling_probability": privacy.get("sampling_probability"),
        **{key: result.get(key) for key in ("metric", "final", "best_step", "chance")},
        **{key: reached.get(key) for key in THRESHOLD},
        "peak_bytes": sum(cost["peak_bytes"].values()) if cost.get("peak_bytes") else None,
        **{key: cost.get(key) for key in ("step_s", "train_s", "example_gradients", "trainable_parameters")},
        "verified": ("no" if record.get("rejected") else "yes") if record["status"] == "done" else None,
        "hardware": hardware(record),
        "error": record["error"],
    }
    if not public:
        diagnostics = record["diagnostics"] or {}
        alignment = diagnostics.get("alignment") or {}
        line |= {f"alignment_{key}": alignment.get(key) for key in ("noisy", "decoded")}
        line["clipped_fraction"] = diagnostics.get("clipped_fraction")
    return line

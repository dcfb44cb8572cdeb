"""What `dpft plan` shows: every run, what it will spend, and what it should cost by runs already made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.plan import plan
from dpft.harness.spec import RunSpec, completed
from dpft.harness.store import Store


def overview(runs: list[RunSpec], store: Store, data_dir: Path | None) -> list[dict[str, Any]]:
    """One row per run. Time and memory come from a record of the same task, model, method and batch size, else null."""
    records = store.records() if store.folder.is_dir() else []
    by_id = {r["run_id"]: r for r in records}
    rows = []
    for spec in runs:
        record = by_id.get(spec.run_id)
        row = {
            "run": spec.run_id,
            "task": spec.task,
            "model": spec.model,
            "method": spec.method,
            "seed": spec.seed,
            "state": "missing" if record is None else record["status"],
        }
        row |= _budget(spec, data_dir) | _estimate(spec, records)
        rows.append(row)
    return rows


def _budget(spec: RunSpec, data_dir: Path | None) -> dict[str, Any]:
    row = {"epsilon": None, "delta": None, "sigma": None, "q": None, "T": spec.steps, "problem": None}
    try:
        found = plan(spec, data_dir, lambda: _dimension(spec, data_dir))
    except CannotRun as error:
        return row | {"problem": str(error)}
    curve = found.epsilon_curve
    return row | {
        "epsilon": curve[-1] if curve else None,
        "delta": found.delta,
        "sigma": found.noise_multiplier,
        "q": found.sampling_probability,
    }


def _dimension(spec: RunSpec, data_dir: Path | None) -> int:
    from dpft.harness.run import release_dimension  # torch and the model, for noise whose epsilon depends on them alone
    from dpft.harness.run_settings import Settings

    return release_dimension(spec, Settings(data_dir))


def _estimate(spec: RunSpec, records: list[dict[str, Any]]) -> dict[str, Any]:
    same = ("task", "model", "method", "batch_size", "max_length", "precision", "decoder", "options", "task_options")
    mine = spec.to_dict()
    for record in records:
        cost, other = record["cost"], completed(record["spec"])
        if cost["step_s"] and all(other[key] == mine[key] for key in same):
            return {
                "seconds": round(cost["step_s"] * spec.steps + cost["eval_s"]),
                "peak_bytes": sum(cost["peak_bytes"].values()),
            }
    return {"seconds": None, "peak_bytes": None}

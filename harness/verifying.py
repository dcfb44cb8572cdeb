"""Every record of a folder verified: what it claims, that its id is that of its spec, and that its curve is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy import verify_record
from dpft.harness.privacy.verify import is_foreign
from dpft.harness.spec import RunSpec, completed
from dpft.harness.store import Store, read_record


def verify_folder(folder: Path) -> dict[str, tuple[list[str], bool]]:
    """By file stem: what is wrong, one sentence each, and whether another program made the record.

    A file of another program needs a `privacy` section with `ledger`, `target`, `delta` and `epsilon`. Raises BadInput for a
    missing folder, a folder without records, and files that are damaged or no records at all.
    """
    store = Store(folder)
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else None
    if not paths:
        what = "no results folder" if paths is None else "no record (*.json) in"
        raise BadInput(f"There is {what} {folder}; name a folder of records, or make one with `dpft run`.")
    found = {}
    for path in paths:
        record = _read(path)
        foreign = is_foreign(record)
        if foreign:
            findings = verify_record(record)
        else:
            findings = [*_identity(record), *verify_record(record, *_curve(store, record))]
            if record["status"] == "done" and not store.curve_path(path.stem).exists():
                findings += ["The record has no curve beside it."]
        found[path.stem] = findings, foreign
    return found


def _read(path: Path) -> Any:
    """A record of ours, checked as always; of others, any JSON object with a privacy section."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"The record {path} is damaged ({error}); delete it or get it again.") from error
    if isinstance(content, dict) and "schema" not in content and "privacy" in content:
        return content
    return read_record(path)


def _identity(record: dict[str, Any]) -> list[str]:
    """Whether the run id is that of the spec."""
    try:
        expected = RunSpec(**completed(record["spec"])).run_id
    except (TypeError, ValueError) as problem:
        return [f"The spec is not that of a run ({problem})."]
    if expected != record["run_id"]:
        return [f"The spec is that of run {expected}, not of {record['run_id']}."]
    return []


def _curve(store: Store, record: dict[str, Any]) -> tuple[int | None, list[float | None] | None]:
    """(rows, their epsilon) of the curve of a run that is done."""
    if record["status"] != "done" or not store.curve_path(record["run_id"]).exists():
        return None, None
    frame = store.curve(record["run_id"])
    private = record["privacy"] is not None and "epsilon" in frame.columns
    return frame.height, frame["epsilon"].to_list() if private else None

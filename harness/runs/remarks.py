"""What a user should know of the data before runs are made of them; nothing of it is recorded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store
from dpft.harness.runs.sources import Sources
from dpft.harness.runs.spec import RunSpec


def of_data(runs: Sequence[RunSpec], sources: Sources) -> list[str]:
    """The notes of every data set among the runs that is on a user's own files. Raises CannotRun where one cannot be read."""
    return [note for spec in _different(runs) for note in sources.notes(spec)]


def of_changes(runs: Sequence[RunSpec], store: Store) -> list[str]:
    """A sentence for each data set whose files had other content when runs in the store were made."""
    different = _different(runs)
    if not different or not store.folder.is_dir():
        return []
    before, found = _specs(store), []
    for spec in different:
        now, kin = spec.task_options["content"], _but_content(spec.to_dict())
        then = [one["task_options"]["content"] for one in before if _but_content(one) == kin]
        if others := [content for content in then if content != now]:
            what = spec.task_options.get("file") or spec.task_options.get("folder") or f"the data of {spec.task}"
            found.append(
                f"Of the runs in {store.folder}, {len(others)} saw other content of {what} "
                f"({', '.join(sorted(set(others)))}; now {now}); they stay there and out of this table."
            )
    return found


def _specs(store: Store) -> list[dict[str, Any]]:
    """Of the records in the store that can be read: the others are other commands' business."""
    found = []
    for run_id in store.ids():
        with contextlib.suppress(BadInput):
            found.append(store.summary(run_id)["spec"])
    return found


def _different(runs: Sequence[RunSpec]) -> list[RunSpec]:
    """One run for each data set of a user's own."""
    own = [spec for spec in runs if spec.task_options.get("content")]
    return list({(spec.task, json.dumps(spec.task_options, sort_keys=True)): spec for spec in own}.values())


def _but_content(spec: dict[str, Any]) -> tuple[str, str] | None:
    """What two specs share whose data differ in content alone; None where content is no part of the spec."""
    options = spec.get("task_options") or {}
    if not options.get("content"):
        return None
    return spec["task"], json.dumps({key: value for key, value in options.items() if key != "content"}, sort_keys=True)

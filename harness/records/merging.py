"""Result folders of several machines joined into one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.records.store import PassedOver, Store
from dpft.harness.runs.spec import completed

FAILED = ("oom", "timeout", "error")  # says something of a machine, and nothing of the run


@dataclass
class Merged:
    """copied: runs that are new in the target; same: that were there; notes: a sentence for each that took another's place."""

    copied: int = 0
    same: int = 0
    notes: list[str] = field(default_factory=list)


def merge(sources: list[Path], target: Path, passed_over: PassedOver = None) -> Merged:
    """Copy the runs of `sources` into `target`. A run that failed on one machine gives way to one that did not; of two failures
    the first is kept.

    Raises BadInput, before anything is copied, when two records of one run that did not fail differ in more than cost and
    provenance, or any two were made of different data.
    """
    into = Store(target, passed_over)
    into.open_for_writing()
    known = {r["run_id"]: r for r in into.sound(into.summary)}
    todo: dict[str, Store] = {}
    done = Merged()
    for source in sources:
        store = Store(source, passed_over)
        for record in store.sound(store.summary):
            run_id = record["run_id"]
            other = known.get(run_id)
            if other is None and into.has(run_id):
                continue  # one that was passed over: it is not for us to replace it
            if other is None or _gives_way(other, record, source):
                if other is not None:
                    done.notes.append(
                        f"Run {run_id}: {record['status']} in {source} takes the place of {other['status']}."
                    )
                done.copied += other is None
                known[run_id] = record
                todo[run_id] = store
            elif _outcome(other) == _outcome(record):
                done.same += 1
            else:
                done.notes.append(f"Run {run_id}: {record['status']} in {source} is left out for {other['status']}.")
    for run_id, store in todo.items():
        into.take_from(store, store.read(run_id))
    return done


def _gives_way(other: dict[str, Any], record: dict[str, Any], source: Path) -> bool:
    """Whether `other` is to be replaced by `record` of the same run. Raises BadInput where they contradict each other."""
    if other_data := _other_data(other, record):
        raise BadInput(
            f"Run {record['run_id']} was made of other data or another model in {source} than elsewhere (fingerprint "
            f"{' against '.join(other_data)}); delete one of the records, or keep the folders apart."
        )
    failed = [one["status"] in FAILED for one in (other, record)]
    if not any(failed) and _outcome(other) != _outcome(record):
        raise BadInput(
            f"Run {record['run_id']} has different outcomes in {source} and elsewhere; delete one of the records."
        )
    return failed == [True, False]


def _other_data(one: dict[str, Any], two: dict[str, Any]) -> tuple[str, str] | None:
    """The first digits of two fingerprints of what the two records were made of, None where those that both have are equal."""
    for key in ("data_fingerprint", "model_files"):
        first, second = (record["provenance"].get(key) for record in (one, two))
        if first is not None and second is not None and first != second:
            return first[:12], second[:12]
    return None


def _outcome(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: record[key] for key in ("status", "privacy", "result")}
    return {**kept, "spec": completed(record["spec"])}

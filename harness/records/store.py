"""Records and curves on disk: one JSON and one parquet file per run, written atomically, merged by name."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpft.harness.border.documents import parsed
from dpft.harness.border.files import content, shown_path
from dpft.harness.border.values import shown
from dpft.harness.errors import BadInput
from dpft.harness.records import curve_files
from dpft.harness.records.packed import RECORDS, Packed
from dpft.harness.records.schema import SCHEMA, check
from dpft.harness.runs.spec import completed
from dpft.harness.train.journal import path_of


class Store:
    """A folder of runs: `<run id>.json` (record), `<run id>.parquet` (curve), `<run id>.ckpt` (run in flight); finished studies
    may be packed (harness/records/packed.py). What is written is loose, and a loose record counts before a packed one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.packed = Packed.of(self.folder)

    def open_for_writing(self) -> None:
        """Make the folder. Raises BadInput when it cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise BadInput(
                f"Results cannot be written to {self.folder} ({error.strerror}); choose --results DIR."
            ) from error

    def record_path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"

    def curve_path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.parquet"

    def checkpoint_path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.ckpt"

    def read(self, run_id: str) -> dict[str, Any] | None:
        """The record of `run_id`, or None when there is none. Raises BadInput when it is damaged."""
        text = self.text(run_id)
        return None if text is None else read_record(text, run_id, self.where(run_id))

    def ids(self) -> list[str]:
        """Run ids of all records, sorted. Raises BadInput for a missing folder."""
        if not self.folder.is_dir():
            raise BadInput(f"There is no results folder {self.folder}; make one with `dpft run`.")
        return sorted({path.stem for path in self.folder.glob("*.json")}.union(self.packed.ids()))

    def text(self, run_id: str) -> bytes | None:
        """The record's JSON, None when there is none. Raises BadInput when it cannot be read."""
        path = self.record_path(run_id)
        if not os.path.lexists(path):
            return self.packed.text(run_id)
        return content(path, "The record", "delete it and run again")

    def where(self, run_id: str) -> str:
        """Where the record of `run_id` is, for messages."""
        path = self.record_path(run_id)
        return shown_path(path if path.exists() else f"{run_id} in {self.folder / RECORDS}")

    def records(self) -> list[dict[str, Any]]:
        """All records, by run id. Raises BadInput for a missing folder or a damaged file."""
        return list(self.each())

    def each(self) -> Iterator[dict[str, Any]]:
        """The records one by one, by run id, for folders that do not fit in memory. Raises as `records`."""
        return map(self.read, self.ids())

    def has_curve(self, run_id: str) -> bool:
        return self.curve_path(run_id).exists() or self._packed_curve(run_id)

    def _packed_curve(self, run_id: str) -> bool:
        """A loose record's curve is loose, too: that of the packed run that it replaces is not its own."""
        return not self.record_path(run_id).exists() and self.packed.has_curve(run_id)

    def curve(self, run_id: str):
        """The curve as a polars frame, one row per step. Raises BadInput when it is missing or damaged."""
        if not self.curve_path(run_id).exists() and self._packed_curve(run_id):
            return self.packed.curve(run_id)
        return curve_files.read(self.curve_path(run_id))

    def write(self, record: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        """Curve first, then the record, each by rename: a record that exists has its curve."""
        import pyarrow

        check(record, "the record to be written")
        run_id = record["run_id"]
        if curve:
            self._write_curve(run_id, pyarrow.Table.from_pylist(curve))
        self._write_record(record)
        # --retry-failed goes on where time or memory was short; after an error the code may change, and the steps with it
        if record["status"] not in ("timeout", "oom"):
            self.checkpoint_path(run_id).unlink(missing_ok=True)
            path_of(self.checkpoint_path(run_id)).unlink(missing_ok=True)

    def sweep(self, run_id: str) -> None:
        """Remove what a killed process left half-written of a run; only who has claimed the run may."""
        for path in self.folder.glob(f".{run_id}.*.tmp"):
            path.unlink(missing_ok=True)

    def take_from(self, other: Store, record: dict[str, Any]) -> None:
        """Copy a run of another store, curve first."""
        if other.has_curve(record["run_id"]):
            self._write_curve(record["run_id"], other.curve(record["run_id"]).to_arrow())
        self._write_record(record)

    def _write_curve(self, run_id: str, table) -> None:
        import pyarrow.parquet

        with atomic(self.curve_path(run_id)) as path:
            pyarrow.parquet.write_table(table.replace_schema_metadata({"schema": str(SCHEMA)}), path)

    def _write_record(self, record: dict[str, Any]) -> None:
        with atomic(self.record_path(record["run_id"])) as path:
            path.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")

    @contextmanager
    def claim(self, run_id: str, wait: bool = False) -> Iterator[bool]:
        """True when this process may make the run; False when another is at it. Released also when the process dies."""
        path = self.folder / ".locks" / run_id  # never unlinked: a waiter would be left holding a file without a name
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def read_record(text: bytes, run_id: str, where: str) -> dict[str, Any]:
    """The record of `run_id`. Raises BadInput, naming its place and what is wrong in it, when it is damaged, of an unknown schema
    or of another run."""
    try:
        record = parsed(text)
    except ValueError as error:
        raise BadInput(f"The record {where} is damaged ({error}); delete it and run again.") from None
    check_place(record, run_id, where)
    return record


def check_place(record: Any, run_id: str, where: str) -> None:
    """Raises BadInput unless `record`, found at `where`, is one, and of the run that it is kept as."""
    check(record, where)
    if record["run_id"] != run_id:
        raise BadInput(f"The record {where} is of run {shown(record['run_id'])}; rename or delete it.")


def merge(sources: list[Path], target: Path) -> tuple[int, int]:
    """Copy the runs of `sources` into `target`; returns (copied, already there).

    Raises BadInput, before anything is copied, when two records of one run differ in more than cost and provenance, or were
    made of different data.
    """
    into = Store(target)
    into.open_for_writing()
    known = {r["run_id"]: r for r in into.records()}
    todo: dict[str, tuple[Store, dict]] = {}
    same = 0
    for source in sources:
        store = Store(source)
        for record in store.records():
            other = known.get(record["run_id"])
            if other is None:
                known[record["run_id"]] = record
                todo[record["run_id"]] = (store, record)
            elif other_data := _other_data(other, record):
                raise BadInput(
                    f"Run {record['run_id']} was made of other data or another model in {source} than elsewhere (fingerprint "
                    f"{' against '.join(other_data)}); delete one of the records, or keep the folders apart."
                )
            elif _outcome(other) == _outcome(record):
                same += 1
            else:
                raise BadInput(
                    f"Run {record['run_id']} has different outcomes in {source} and elsewhere; delete one of the records."
                )
    for store, record in todo.values():
        into.take_from(store, record)
    return len(todo), same


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


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it, flushed to disk, when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Records and curves on disk: one JSON and one parquet file per run, written atomically, merged by name."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpft.harness.border.documents import parsed
from dpft.harness.border.files import content, shown_path, stamp_of
from dpft.harness.errors import BadInput
from dpft.harness.records import curve_files, looks
from dpft.harness.records.damaged import Counted, PassedOver, readable
from dpft.harness.records.packed import RECORDS, Packed
from dpft.harness.records.schema import SCHEMA, check, check_place
from dpft.harness.records.slim import Reader
from dpft.harness.train.journal import path_of

LOCK = "lock"  # in the folder of what is being written
# --retry-failed goes on from the checkpoint of these; one that diverged would do so again from the same state
CONTINUED = ("timeout", "oom", "error")


class Store:
    """A folder of runs: `<run id>.json` (record), `<run id>.parquet` (curve), `<run id>.ckpt` (run in flight); finished studies
    may be packed (harness/records/packed.py). What is written is loose, and a loose record counts before a packed one.

    passed_over: told of each damaged or newer record, in one sentence, where such are to be left out; None: they are errors.
    counted: gives ids one by one where many records are read, and may show how far that is.
    """

    def __init__(self, folder: str | Path, passed_over: PassedOver = None, counted: Counted = iter):
        self.folder, self.passed_over, self.counted = Path(folder), passed_over, counted
        self.packed = Packed.of(self.folder)
        self._loose = f"{self.folder}{os.sep}"  # a path is made of it for each record: as text in a tenth of the time
        self._reader, self._summaries, self.ahead = Reader(), {}, curve_files.Ahead(self.curve_path)

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

    def summary(self, run_id: str) -> dict[str, Any] | None:
        """As `read`, without the diagnostics by matrix and step; to be read only. Parsed again only where it was replaced."""
        stamp = stamp_of(f"{self._loose}{run_id}.json") or self.packed.stamp()
        known, record = self._summaries.get(run_id, (None, None))
        if stamp is None or stamp != known:
            text = self.text(run_id)
            record = (
                None if text is None else self._reader.record(text) or read_record(text, run_id, self.where(run_id))
            )
            if record is not None:
                self._checked(record, run_id)
                self._summaries[run_id] = stamp, record
        return record

    def _checked(self, record: dict[str, Any], run_id: str) -> None:
        try:
            check_place(record, run_id, "")
        except BadInput:
            check_place(record, run_id, self.where(run_id))  # which takes time to say

    def ids(self) -> list[str]:
        """Run ids of all records, sorted. Raises BadInput for a missing folder."""
        if not self.folder.is_dir():
            raise BadInput(f"There is no results folder {self.folder}; make one with `dpft run`.")
        loose = {name.removesuffix(".json") for name in os.listdir(self.folder) if name.endswith(".json")}
        return sorted(loose.union(self.packed.ids()) - {""})

    def has(self, run_id: str) -> bool:
        """Whether there is a record, damaged or not."""
        return os.path.exists(f"{self._loose}{run_id}.json") or self.packed.has(run_id)

    def text(self, run_id: str) -> bytes | None:
        """The record's JSON, None when there is none. Raises BadInput when it cannot be read."""
        if not os.path.lexists(path := f"{self._loose}{run_id}.json"):
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
        return self.sound(self.read)

    def has_curve(self, run_id: str) -> bool:
        return self.curve_path(run_id).exists() or self._packed_curve(run_id)

    def _packed_curve(self, run_id: str) -> bool:
        """A loose record's curve is loose, too: that of the packed run that it replaces is not its own."""
        return not os.path.exists(f"{self._loose}{run_id}.json") and self.packed.has_curve(run_id)

    def sound(
        self, read: Callable[[str], Any], run_ids: Iterable[str] | None = None, curves: bool = False
    ) -> Iterator[Any]:
        """`read` of the id of every record, or of those of `run_ids` that are there. curves: theirs will be asked for, too.

        Raises BadInput as `readable`.
        """
        ids = self.ids() if run_ids is None else sorted(run_id for run_id in run_ids if self.has(run_id))
        return readable(
            self.ahead.each(ids, self.counted) if curves else self.counted(ids),
            read if self.passed_over is None else lambda run_id: self._whole(read(run_id)),
            self.passed_over,
        )

    def _whole(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record, if it has the curve that it needs. Raises BadInput."""
        import polars

        path = self.curve_path(record["run_id"])
        try:
            if record["status"] == "done" and not self._packed_curve(record["run_id"]):
                polars.read_parquet_schema(path)
        except Exception as error:
            raise BadInput(
                f"The curve {path} cannot be read ({' '.join(str(error).split())}); make the run again."
            ) from error
        return record

    def unspoilt(self, run_ids: Sequence[str]) -> list[str]:
        """Those of `run_ids` that have a sound record or none; raises for the others, or passes over them, as `each`."""
        present = {run_id for run_id in run_ids if self.has(run_id)}
        sound = {record["run_id"] for record in self.sound(self.summary, present)}
        return [run_id for run_id in run_ids if run_id not in present or run_id in sound]

    def curve(self, run_id: str, whole: bool = False):
        """The curve as a polars frame, one row per step; whole: with what was looked at by parameter.

        Raises BadInput when it is missing or damaged.
        """
        if (read_already := self.ahead.take(run_id, whole)) is not None:
            return read_already
        if not self.curve_path(run_id).exists() and self._packed_curve(run_id):
            return self.packed.curve(run_id, whole)
        return curve_files.read(self.curve_path(run_id), whole)

    def looks(self, run_id: str) -> looks.Looks:
        """What a run of this schema looked at by parameter. Raises BadInput when its curve is damaged."""
        return looks.of(self.curve(run_id, whole=True).rows(named=True) if self.has_curve(run_id) else [], run_id)

    def whole(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of a run of this store with all its diagnostics, wherever it has them. Raises BadInput as `looks`."""
        if record["schema"] == 1:  # which has them in itself, but not in a summary
            return record if looks.KINDS[0] in record["diagnostics"] else self.read(record["run_id"])
        return {**record, "diagnostics": {**record["diagnostics"], **self.looks(record["run_id"])}}

    def write(self, record: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        """Curve first, then the record, each by rename: a record that exists has its curve."""
        import pyarrow

        check(record, "the record to be written")
        run_id = record["run_id"]
        record, seen = looks.apart(record)
        if curve:
            table = pyarrow.Table.from_pylist(curve)
            if (column := looks.column(seen, [row["step"] for row in curve])) is not None:
                table = table.append_column(looks.COLUMN, [column])
            self._write_curve(run_id, table)
        self._write_record(record)
        if record["status"] not in CONTINUED:
            self.checkpoint_path(run_id).unlink(missing_ok=True)
            path_of(self.checkpoint_path(run_id)).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes left half-written: folders that no living process holds (see `atomic`)."""
        for folder in self.folder.glob(".*.tmp"):
            try:
                with suppress(BlockingIOError), open(folder / LOCK, "rb") as handle:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # killed before it had a lock
                with suppress(OSError):
                    folder.rmdir()
            except NotADirectoryError:  # of an older dpft
                folder.unlink(missing_ok=True)

    def stamps(self, run_ids: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """What tells each record from one that replaces it; nothing for runs that have none. Equal or not is all it says."""
        found = ((run_id, stamp_of(self.record_path(run_id))) for run_id in run_ids)
        return {run_id: stamp for run_id, stamp in found if stamp is not None}

    def take_from(self, other: Store, record: dict[str, Any]) -> None:
        """Copy a run of another store, curve first."""
        if other.has_curve(record["run_id"]):
            self._write_curve(record["run_id"], other.curve(record["run_id"], whole=True).to_arrow())
        self._write_record(record)

    def _write_curve(self, run_id: str, table) -> None:
        import pyarrow.parquet

        with atomic(self.curve_path(run_id)) as path:
            table = table.replace_schema_metadata({"schema": str(SCHEMA)})
            pyarrow.parquet.write_table(table, path, write_statistics=False)  # nobody skips a part of one run

    def _write_record(self, record: dict[str, Any]) -> None:
        with atomic(self.record_path(record["run_id"])) as path:
            path.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")

    @contextmanager
    def claim(self, run_id: str, wait: bool = False) -> Iterator[bool]:
        """True when this process may make the run; False when another is at it. Released also when the process dies."""
        path = self.folder / ".locks" / run_id  # never unlinked: a waiter would be left holding a file without a name
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as handle:
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


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path`, flushed to disk, when the block ends well. An OSError names `path`.

    It lies in a folder of its own beside `path`, as libraries (safetensors) put temporary files of theirs beside it. While the
    folder is there, its process holds a lock in it, which ends with the process: `Store.sweep` removes what nobody holds. A lock
    tells that also across containers and on shared folders, where the number of a process does not.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _locked(folder):
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)  # of a write, which does not say of what
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A new folder, with a lock in it."""
    lock = folder / LOCK
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = open(lock, "wb")  # noqa: SIM115
        except FileNotFoundError:  # swept between the two
            continue
        with handle:
            with suppress(OSError):  # a file system without locks: others cannot lock it either, and leave it
                fcntl.flock(handle, fcntl.LOCK_EX)
            if lock.exists() and os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                yield
                return

"""A finished study in two files: every run of a folder in `records.parquet`, every curve in `curves.parquet`.

`records.parquet` has a row per run: run_id, what one picks runs by, the names of its curve's columns, and `record`, the text
of `<run id>.json` byte for byte. `curves.parquet` has a row per step: run_id and the columns of all curves. Both are sorted
by run id. A loose file beside them is newer and counts instead.
"""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.border.files import shown_path, trouble
from dpft.harness.errors import BadInput, first_line
from dpft.harness.records.curve_files import trouble_in
from dpft.harness.records.looks import COLUMN

if TYPE_CHECKING:
    import polars
    import pyarrow.parquet

RECORDS, CURVES = "records.parquet", "curves.parquet"
SCHEMA = 1
TEXTS = ("string", "string_view")
LISTS = tuple(f"list<{name}: {kind}>" for name in ("item", "element") for kind in (*TEXTS, "large_string"))
TYPES = {"run_id": TEXTS, "record": TEXTS, "columns": LISTS, "step": ("int64",)}  # as arrow calls them, large_ or not


class Packed:
    """The packed runs of a folder; none where it has no such files. Files that are replaced meanwhile are read anew."""

    def __init__(self, records: Path, curves: Path) -> None:
        self._records = _Blocks(records, ("run_id", "record", "columns"), _rows)
        self._curves = _Blocks(curves, ("run_id", "step"), _frames, left_out=COLUMN)
        self._whole = _Blocks(curves, ("run_id", "step"), _frames)

    @classmethod
    def of(cls, folder: Path) -> Packed:
        return cls(folder / RECORDS, folder / CURVES)

    def ids(self) -> list[str]:
        """Run ids, sorted. Raises BadInput for a damaged file, as all of these."""
        return self._records.ids()

    def stamp(self) -> tuple[int, ...] | None:
        """What tells the file of records from one that replaces it; None where there is none."""
        return self._records.seen if self._records.opened() else None

    def text(self, run_id: str) -> bytes | None:
        """The record's JSON, None where the run is not among them."""
        row = self._row(run_id)
        return None if row is None else str(row["record"]).encode()

    def has(self, run_id: str) -> bool:
        return run_id in self._records.known()

    def has_curve(self, run_id: str) -> bool:
        row = self._row(run_id)
        return row is not None and row["columns"] is not None

    def curve(self, run_id: str, whole: bool = False) -> polars.DataFrame | None:
        """One row per step, with the columns that the run's own file had; whole: as of `curve_files.read`."""
        row, blocks = self._row(run_id), self._whole if whole else self._curves
        if row is None or row["columns"] is None:
            return None
        found = blocks.of(run_id)
        if found is None:
            raise BadInput(f"{shown_path(blocks.path)} lacks the curve of {run_id}; get it again.")
        names = [name for name in row["columns"] if whole or name != COLUMN]
        frame = blocks.guarded(lambda: found[names])  # `select` takes ten times as long
        if (problem := trouble_in(frame)) is not None:
            raise BadInput(f"The curve of {run_id} in {shown_path(self._curves.path)} {problem}; get the file again.")
        return frame

    def evaluations(self, columns: Iterable[str]) -> polars.LazyFrame | None:
        """`run_id` and these columns of all steps that were evaluated; what no curve has is null."""
        import polars

        if not self._curves.opened():
            return None
        lazy = polars.scan_parquet(self._curves.path, glob=False)
        there = lazy.collect_schema().names()
        wanted = [polars.col(c) if c in there else polars.lit(None, polars.Float64).alias(c) for c in columns]
        return lazy.filter(polars.col("metric").is_not_null()).select("run_id", *wanted)

    def _row(self, run_id: str) -> dict[str, Any] | None:
        return self._records.of(run_id)


def _rows(table: polars.DataFrame) -> dict[str, dict[str, Any]]:
    """Run id -> its row, of a row group of records."""
    return {row["run_id"]: row for row in reversed(table.rows(named=True))}


def _frames(table: polars.DataFrame) -> dict[str, polars.DataFrame]:
    """Run id -> its rows, of a row group of curves."""
    return {key[0]: one for key, one in table.partition_by("run_id", as_dict=True).items()}


class _Blocks:
    """A parquet file that is sorted by run id, of which one row group is held at a time.

    columns: that it must have; apart: run id -> its part of a row group; left_out: a column that is not read.
    """

    def __init__(
        self,
        path: Path,
        columns: tuple[str, ...],
        apart: Callable[[polars.DataFrame], dict[str, Any]],
        left_out: str | None = None,
    ) -> None:
        self.path, self._columns, self._apart, self._left_out = path, columns, apart, left_out
        self._name = os.fspath(path)
        self.seen: tuple | None = None
        self._file: pyarrow.parquet.ParquetFile | None = None
        self._firsts: list[str] = []
        self._held: tuple[int, dict[str, Any]] | None = None
        self._known: Collection[str] | None = None

    def ids(self) -> list[str]:
        if not self.opened():
            return []
        return self.guarded(lambda: self._file.read(["run_id"])["run_id"].to_pylist())

    def known(self) -> Collection[str]:
        """As `ids`, to look into: in whatever order runs are asked for, no row group is read for it."""
        if not self.opened():
            return ()
        if self._known is None:
            self._known = frozenset(self.ids())
        return self._known

    def of(self, run_id: str) -> Any:
        """What the file has of `run_id`; None where that is nothing, or no file is there."""
        import polars

        if not self.opened():
            return None
        index = max(0, bisect.bisect_right(self._firsts, run_id) - 1)
        if self._held is None or self._held[0] != index:
            names = [name for name in self._file.schema_arrow.names if name != self._left_out]
            read = self.guarded(lambda: self._apart(polars.from_arrow(self._file.read_row_group(index, names))))
            self._held = index, read
        return self._held[1].get(run_id)

    def opened(self) -> bool:
        """Whether there is a file with runs in it; opened, and read anew where it is not the one that was opened."""
        import pyarrow.parquet

        try:
            found = os.stat(self._name)  # asked once for each run: nothing else is, while the file is the same
        except OSError:
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            if not os.path.lexists(self.path):
                return False
            raise BadInput(f"{shown_path(self.path)} {trouble(self.path) or 'was replaced'}; get it again.")
        seen = found.st_ino, found.st_size, found.st_mtime_ns
        if seen != self.seen:
            self._file = self.guarded(lambda: pyarrow.parquet.ParquetFile(self.path))
            _check_schema(self.path, self._file.schema_arrow, self._columns)
            meta = self._file.metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups if meta.num_rows else 0)]
            at = self._file.schema_arrow.get_field_index("run_id")
            self._firsts = self.guarded(lambda: [group.column(at).statistics.min for group in groups])
            self.seen, self._held, self._known = seen, None, None
        return bool(self._firsts)

    def guarded(self, read):
        try:
            return read()
        except Exception as error:  # arrow has many
            raise BadInput(f"{shown_path(self.path)} is damaged ({first_line(error)}); get it again.") from error


def _check_schema(path: Path, schema, columns: tuple[str, ...]) -> None:
    found = (schema.metadata or {}).get(b"dpft", b"").decode()
    if found != str(SCHEMA):
        has = f"has schema {found}, not {SCHEMA}" if found else "is no packed study of dpft"
        raise BadInput(f"{shown_path(path)} {has}; read it with the dpft that wrote it, or move it away.")
    if lacking := [name for name in columns if name not in schema.names]:
        raise BadInput(f"{shown_path(path)} is damaged (it lacks the column {lacking[0]}); get it again.")
    for name in columns:
        if (kind := str(schema.field(name).type).removeprefix("large_")) not in TYPES[name]:
            raise BadInput(f"{shown_path(path)} is damaged (its column {name} is of type {kind}); get it again.")

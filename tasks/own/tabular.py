"""Tables of a user's own: CSV, TSV, parquet, JSON lines. Whatever is wrong with one is a sentence that names file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import CannotRun, first_line

if TYPE_CHECKING:
    import polars

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
KINDS = "csv, tsv, jsonl or ndjson (also with .gz), or parquet"


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        where: what messages call it.
        columns: their names, in order.
        size: number of rows.
        values: the values of a column, in order; None where a row has none.
        place: where row i (from 0) stands, for a person who looks for it.
    """

    where: str
    columns: tuple[str, ...]
    size: int
    values: Callable[[str], list[Any]]
    place: Callable[[int], str]


def read(path: Path) -> Table:
    """The table in a regular file, of the kind that its ending says. Raises CannotRun for what cannot be read as such."""
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if kind == ".parquet" and path.suffix.lower() != ".gz":
        return _parquet(path)
    if kind not in SEPARATORS and kind not in LINES:
        raise CannotRun(f"{path} has none of the endings that are read, {KINDS}; write the data as one of them.")
    text = _text(path)
    if not text.strip():
        raise CannotRun(f"{path} is empty; give a file with rows.")
    return _separated(path, text, SEPARATORS[kind]) if kind in SEPARATORS else _json_lines(path, text)


def of_frame(frame: polars.DataFrame, where: str) -> Table:
    """A table of polars."""
    return Table(where, tuple(frame.columns), len(frame), lambda name: frame[name].to_list(), lambda i: f"row {i + 1}")


def _parquet(path: Path) -> Table:
    import polars

    try:
        return of_frame(polars.read_parquet(path, glob=False), str(path))
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
        reason = first_line(error, "unreadable")
        raise CannotRun(f"{path} is not a readable parquet file ({reason}); write it again.") from error


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CannotRun(f"{path} is not a readable gz file ({str(error).rstrip('.')}); write it again.") from error
    except OSError as error:
        raise CannotRun(f"Cannot read {path} ({error.strerror}); check the file and its permissions.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise CannotRun(
            f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} in line {line}); convert it, for example with "
            f"`iconv -f {guess} -t UTF-8`."
        ) from error


def _separated(path: Path, text: str, separator: str) -> Table:
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, lines, begins = [], [], 1
    try:
        for row in reader:
            if row:  # else a blank line
                rows.append(row)
                lines.append(begins)
            begins = reader.line_num + 1
    except csv.Error as error:
        raise CannotRun(
            f"{path} is not a readable table: {error} in the row that begins in line {begins}; mend its quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = [name.strip() for name in rows[0]]
    if twice := next((name for i, name in enumerate(header) if name in header[:i]), None):
        raise CannotRun(f"{path} has two columns called {twice!r}; rename one.")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise CannotRun(
                f"{path} is ragged: its first line has {len(header)} cells, line {line} has {len(row)}; mend that row, or put a "
                "cell that holds the separator in quotes."
            )
    places = {name: i for i, name in enumerate(header)}
    return Table(
        str(path),
        tuple(header),
        len(rows) - 1,
        lambda name: [row[places[name]] for row in rows[1:]],
        lambda i: f"line {lines[i + 1]}",
    )


def _json_lines(path: Path, text: str) -> Table:
    rows, lines, columns = [], [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CannotRun(
                f"{path} is not a readable {path.suffix[1:]} file (line {number}: {error}); each line must be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise CannotRun(f"{path} has no JSON object in line {number}; write each row as {{...}} on its own line.")
        rows.append(row)
        lines.append(number)
        columns |= dict.fromkeys(row)
    return Table(
        str(path),
        tuple(columns),
        len(rows),
        lambda name: [row.get(name) for row in rows],
        lambda i: f"line {lines[i]}",
    )

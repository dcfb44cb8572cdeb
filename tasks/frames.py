"""Tables of text: checked columns of any table, and a user's own parquet or JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun

if TYPE_CHECKING:
    import polars


def texts(table: polars.DataFrame, columns: dict[str, str], where: str) -> list[dict[str, str]]:
    """Rows of text: `columns` gives the table's column for each key. Raises CannotRun for missing columns, types and values."""
    import polars

    if lacking := [column for column in columns.values() if column not in table.columns]:
        raise CannotRun(f"{where} has no column {lacking[0]}; it has {', '.join(table.columns)}.")
    if table.is_empty():
        raise CannotRun(f"{where} has no rows; put the whole split there.")
    for column in columns.values():
        if table[column].dtype != polars.String:
            raise CannotRun(f"The column {column} of {where} holds {table[column].dtype}, not text; name another one.")
        if empty := int((table[column].is_null() | (table[column].str.strip_chars() == "")).sum()):
            raise CannotRun(f"{where} has {empty} rows without {column}; every row needs one.")
    return table.select(polars.col(column).alias(key) for key, column in columns.items()).to_dicts()


def from_file(path: Path) -> polars.DataFrame:
    """A parquet or JSONL file. Raises CannotRun, naming it, for other kinds and for a missing or damaged one."""
    import polars

    readers = {".parquet": lambda: polars.read_parquet(path, glob=False), ".jsonl": lambda: polars.read_ndjson(path)}
    if path.suffix not in readers:
        raise CannotRun(f"{path} is neither a .parquet nor a .jsonl file; write the data as one of them.")
    if not path.is_file():
        raise CannotRun(f"The data file {path} does not exist; give an existing one.")
    try:
        return readers[path.suffix]()
    except (polars.exceptions.PolarsError, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0].rstrip(".")
        raise CannotRun(f"{path} is not a readable {path.suffix[1:]} file ({reason}); write it again.") from error

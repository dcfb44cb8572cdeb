"""Tables of rows: a split from a mirror folder or from the hub, and a user's own parquet or JSONL file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import CannotRun

if TYPE_CHECKING:
    import polars


def from_mirror(path: Path, hub_id: str) -> polars.DataFrame:
    """The split of `hub_id` at `path`. Raises CannotRun, naming the path, when it is missing or damaged."""
    import polars

    return _mirrored(path, hub_id, lambda: polars.read_parquet(path, glob=False))


def rows_of(path: Path, hub_id: str) -> int:
    """Its number of rows, from the metadata. Raises CannotRun as `from_mirror` does."""
    import polars

    return _mirrored(path, hub_id, lambda: polars.scan_parquet(path, glob=False).select(polars.len()).collect().item())


def _mirrored(path: Path, hub_id: str, read: Callable[[], Any]) -> Any:
    import polars

    if not path.is_file():
        raise CannotRun(f"The data mirror has no file {path}; put that split of {hub_id} there as parquet.")
    try:
        return read()
    except (polars.exceptions.PolarsError, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0].rstrip(".")
        raise CannotRun(f"{path} is not a readable parquet file ({reason}); copy it again.") from error


def from_hub(
    hub: str, split: str, hub_id: str, config: str | None = None, revision: str | None = None
) -> polars.DataFrame:
    """A split of the hub's data set `hub_id`. hub: what the mirror's folder is called. Raises CannotRun when it cannot be had."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision).to_polars()
    except Exception as error:  # connection, cache and schema errors of four libraries end up here
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
        raise CannotRun(
            f"Cannot get {hub} from the hub ({reason}); give --data-dir with a mirror {hub}/{split}.parquet."
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


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

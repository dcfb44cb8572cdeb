"""Splits of hub datasets as tables: from a local mirror of parquet files, or through `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.border.files import ABSENT, shown_path, trouble
from dpft.harness.errors import CannotRun, first_line
from dpft.tasks.hub import Fetch, cached_data, silent

if TYPE_CHECKING:
    import polars


def split_of(
    hub: str, split: str, root: Path | None, revision: str | None = None, hint: str = ""
) -> tuple[polars.DataFrame, str]:
    """(rows, where they are from) of a split of `hub`, which is "owner/name/config", or "owner/name" without configurations.

    root: the mirror folder, with the file `<hub>/<split>.parquet`; None: the hub, at `revision`. hint: what else can be
    done where the mirror lacks the split. Raises CannotRun, naming the path, when the mirror lacks the file or it is damaged,
    and when there is no mirror and the hub cannot be reached.
    """
    import polars

    if root is None:
        return _from_hub(hub, split, revision), f"{hub} ({split}) on the hub"
    path = root / hub / f"{split}.parquet"
    return _mirrored(hub, path, lambda: polars.read_parquet(path, glob=False), hint), str(path)


def count_of(hub: str, split: str, root: Path) -> int:
    """Rows of a split in the mirror, from the metadata of its file. Raises CannotRun as `split_of` does."""
    import polars

    path = root / hub / f"{split}.parquet"
    return _mirrored(hub, path, lambda: polars.scan_parquet(path, glob=False).select(polars.len()).collect().item())


def lacking(
    hub: str, splits: Sequence[str], root: Path | None, columns: Sequence[str] = (), revision: str | None = None
) -> list[Fetch]:
    """What must be fetched before these splits can be read; with a mirror nothing, but they must be there with their columns.

    Raises CannotRun as `split_of`, from the files' metadata alone.
    """
    import polars

    if root is None:
        get = [partial(_from_hub, hub, split, revision) for split in splits]
        fetch = Fetch(f"the data {hub}", "the hub", lambda: [one() for one in get], None, instead(hub, splits[0]))
        return [] if cached_data(hub) else [fetch]
    for split in splits:
        path = root / hub / f"{split}.parquet"
        there = _mirrored(hub, path, partial(polars.read_parquet_schema, path))
        if absent := [column for column in columns if column not in there]:
            raise CannotRun(f"{path} has no column {absent[0]}, but {', '.join(there)}; copy it from {hub} again.")
    return []


def instead(hub: str, split: str) -> str:
    """What can be done where data of the hub are not here and it does not answer; the end of a sentence."""
    return f"give --data-dir with a mirror {hub}/{split}.parquet, or fetch them where there is a network with `dpft prepare`"


def _mirrored(hub: str, path: Path, read: Callable[[], Any], hint: str = "") -> Any:
    import polars

    problem = trouble(path)
    if problem == ABSENT:
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.parquet")))
        has = f" but the splits {there}" if there else ""
        raise CannotRun(
            f"The data mirror has no file {path}{has}; put that split of {_parts(hub)[0]} there as parquet{hint}."
        )
    if problem is not None:
        raise CannotRun(f"{shown_path(path)} {problem}; put that split of {_parts(hub)[0]} there as parquet{hint}.")
    try:
        return read()
    except (polars.exceptions.PolarsError, OSError) as error:
        reason = first_line(error, "unreadable")
        raise CannotRun(f"{path} is not a readable parquet file ({reason}); copy it again.") from error


def _parts(hub: str) -> tuple[str, str | None]:
    """(hub id, configuration or None)."""
    owner, name, *config = hub.split("/")
    return f"{owner}/{name}", config[0] if config else None


def _from_hub(hub: str, split: str, revision: str | None) -> polars.DataFrame:
    unheard = silent()
    import datasets

    hub_id, config = _parts(hub)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision).to_polars()
    except Exception as error:  # connection, cache and schema errors of four libraries end up here
        reason = first_line(error, longest=200)
        if unheard:
            reason = f"it is not in the cache, and {unheard}"
        raise CannotRun(f"Cannot get {hub} from the hub ({reason}); {instead(hub, split)}.") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()

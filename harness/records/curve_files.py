"""The curve of a run as it is read: a table with a row for each step, and columns that hold numbers. What was looked at by
parameter lies in one column more (looks.py), which is read when it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.border.files import shown_path, trouble
from dpft.harness.errors import BadInput
from dpft.harness.records.damaged import Counted
from dpft.harness.records.looks import COLUMN

if TYPE_CHECKING:
    import polars

NEEDED = ("step", "metric")
BLOCK = 64  # curves that are read together
PLACE = "read from"  # a column that no curve has
NUMBERS = ("epsilon", "loss", "metric", "lr", "clipped_fraction", "alignment_noisy", "alignment_decoded", "snr")


def read(path: Path, whole: bool = False) -> polars.DataFrame:
    """A curve file; whole: with what was looked at by parameter, if anything was.

    Raises BadInput, naming it, where it is missing, no table, or none of steps.
    """
    import polars

    problem = trouble(path)
    if problem is None:
        try:
            lazy = polars.scan_parquet(path, glob=False)
            frame = (lazy if whole else lazy.drop(COLUMN, strict=False)).collect()
        except Exception as error:  # polars has errors of its own, and panics
            problem = f"is no readable parquet file ({(str(error).splitlines() or ['?'])[0]})"
        else:
            problem = trouble_in(frame)
    if problem is not None:
        raise BadInput(f"The curve {shown_path(path)} {problem}; delete {path.stem}.json and run again.")
    return frame


class Ahead:
    """Reads the curves of many runs in blocks, in half the time that one by one takes; what cannot be read so is left out."""

    def __init__(self, path_of: Callable[[str], Path]) -> None:
        self._path_of, self._frames, self._whole = path_of, {}, False

    def each(self, run_ids: Sequence[str], counted: Counted = iter, whole: bool = False) -> Iterator[str]:
        """The ids, in order; the curves of a block have been read before its first.

        counted: as of a store; whole: as of `read`.
        """
        self._whole = whole
        for place, run_id in enumerate(counted(run_ids)):
            if place % BLOCK == 0:
                self._frames = _together([self._path_of(one) for one in run_ids[place : place + BLOCK]], whole)
            yield run_id
        self._frames = {}

    def take(self, run_id: str, whole: bool = False) -> polars.DataFrame | None:
        """The curve of a run of this block, once; None where it was not read: `read` says why."""
        return self._frames.pop(str(self._path_of(run_id)), None) if whole == self._whole else None


def _together(paths: Sequence[Path], whole: bool) -> dict[str, polars.DataFrame]:
    """Path -> curve, of those that are sound; files of one layout are read at once."""
    import polars

    alike: dict[str, list[Path]] = {}
    for path in paths:
        if trouble(path) is None:
            with contextlib.suppress(Exception):  # polars has errors of its own, and panics
                alike.setdefault(repr(polars.read_parquet_schema(path)), []).append(path)
    found: dict[str, polars.DataFrame] = {}
    for group in alike.values():
        with contextlib.suppress(Exception):
            lazy = polars.scan_parquet(group, glob=False, include_file_paths=PLACE)
            rows = (lazy if whole else lazy.drop(COLUMN, strict=False)).collect()
            found |= {key[0]: one for key, one in rows.partition_by(PLACE, as_dict=True, include_key=False).items()}
    return {path: frame for path, frame in found.items() if trouble_in(frame) is None}


def trouble_in(frame: polars.DataFrame) -> str | None:
    """What is wrong with a curve, as the end of a sentence; None where nothing is."""
    import polars

    schema = frame.schema  # polars makes it anew each time
    if lacking := [name for name in NEEDED if name not in schema]:
        return f"lacks the column {lacking[0]}"
    for name in {"step", *NUMBERS} & schema.keys():
        kind = schema[name]
        if not (kind.is_integer() if name == "step" else kind.is_numeric() or kind == polars.Null):
            return f"has {kind} in column {name}, where numbers belong"
    if frame["step"].to_list() != list(range(1, frame.height + 1)):
        return "does not count its steps from 1"
    return None

"""The curve of a run as it is read: a table with a row for each step, and columns that hold numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.border.files import shown_path, trouble
from dpft.harness.errors import BadInput

if TYPE_CHECKING:
    import polars

NEEDED = ("step", "metric")
NUMBERS = ("epsilon", "loss", "metric", "lr", "clipped_fraction", "alignment_noisy", "alignment_decoded", "snr")


def read(path: Path) -> polars.DataFrame:
    """A curve file. Raises BadInput, naming it, where it is missing, no table, or none of steps."""
    import polars

    problem = trouble(path)
    if problem is None:
        try:
            frame = polars.read_parquet(path, glob=False)
        except Exception as error:  # polars has errors of its own, and panics
            problem = f"is no readable parquet file ({(str(error).splitlines() or ['?'])[0]})"
        else:
            problem = trouble_in(frame)
    if problem is not None:
        raise BadInput(f"The curve {shown_path(path)} {problem}; delete {path.stem}.json and run again.")
    return frame


def trouble_in(frame: polars.DataFrame) -> str | None:
    """What is wrong with a curve, as the end of a sentence; None where nothing is."""
    import polars

    if lacking := [name for name in NEEDED if name not in frame.columns]:
        return f"lacks the column {lacking[0]}"
    for name in {"step", *NUMBERS} & set(frame.columns):
        kind = frame.schema[name]
        if not (kind.is_integer() if name == "step" else kind.is_numeric() or kind == polars.Null):
            return f"has {kind} in column {name}, where numbers belong"
    if frame["step"].to_list() != list(range(1, frame.height + 1)):
        return "does not count its steps from 1"
    return None

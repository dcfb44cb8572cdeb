"""What a run looked at by parameter, as a column of its curve file: a list for each evaluated step, an entry for each parameter.

In memory, and in records of schema 1, it is three lists of rows by step in `diagnostics` (KINDS).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import BadInput, first_line
from dpft.harness.records.schema import SCHEMA

if TYPE_CHECKING:
    import pyarrow

COLUMN = "by_parameter"
KINDS = ("alignment_by_parameter", "decoder_by_parameter", "spectra")
_THEORY = ("spikes", "first", "cosine_noisy", "cosine_decoded")
Looks = dict[str, list[dict[str, Any]]]


def apart(record: Mapping[str, Any]) -> tuple[dict[str, Any], Looks]:
    """(the record as it is kept, what goes beside its curve)."""
    diagnostics = record["diagnostics"]
    kept = {key: value for key, value in diagnostics.items() if key not in KINDS}
    return {**record, "schema": SCHEMA, "diagnostics": kept}, {kind: diagnostics.get(kind, []) for kind in KINDS}


def column(looks: Looks, steps: Sequence[int]) -> pyarrow.Array | None:
    """The column for a curve of these steps; None where nothing was looked at. A step that failed has no row, and is left out."""
    import pyarrow

    by_step = [{row["step"]: row for row in looks[kind]} for kind in KINDS]
    found = [_entries(*(rows.get(step) for rows in by_step)) for step in steps]
    return None if all(entries is None for entries in found) else pyarrow.array(found, _type())


def of(curve: Sequence[Mapping[str, Any]], run_id: str) -> Looks:
    """The three lists of the rows of a curve that was read whole. Raises BadInput where its column is none of ours."""
    try:
        return rows({row["step"]: row[COLUMN] for row in curve if row.get(COLUMN) is not None})
    except Exception as problem:  # whatever it holds
        raise BadInput(
            f"The curve of run {run_id} is damaged in its column {COLUMN} ({first_line(problem)}); run it again."
        ) from problem


def rows(entries: Mapping[int, Sequence[Mapping[str, Any]]]) -> Looks:
    """The three lists again. entries: by step, of the steps that were looked at."""
    found: Looks = {kind: [] for kind in KINDS}
    for step, parameters in entries.items():
        aligned = {one["parameter"]: one["alignment"] for one in parameters if one["alignment"] is not None}
        decoded = {one["parameter"]: json.loads(one["decoder"]) for one in parameters if one["decoder"] is not None}
        matrices = {one["parameter"]: _matrix(one["spectrum"]) for one in parameters if one["spectrum"] is not None}
        if aligned or not parameters:
            found["alignment_by_parameter"].append({"step": step, **aligned})
        if decoded:
            found["decoder_by_parameter"].append({"step": step, **decoded})
        if matrices:
            found["spectra"].append({"step": step, "matrices": matrices})
    return found


def _entries(aligned: dict | None, decoded: dict | None, spectra: dict | None) -> list[dict[str, Any]] | None:
    if aligned is None and decoded is None and spectra is None:
        return None
    aligned, decoded, matrices = aligned or {}, decoded or {}, (spectra or {}).get("matrices", {})
    return [
        {
            "parameter": name,
            "alignment": aligned.get(name),
            "decoder": json.dumps(decoded[name], allow_nan=False) if name in decoded else None,
            "spectrum": _flat(matrices[name]) if name in matrices else None,
        }
        for name in dict.fromkeys(_names(aligned, decoded, matrices))
    ]


def _names(*rows: Mapping[str, Any]) -> Iterator[str]:
    for row in rows:
        yield from (name for name in row if name != "step")


def _flat(matrix: Mapping[str, Any]) -> dict[str, Any]:
    """What theory says of a spectrum beside what was seen of it."""
    seen = {key: value for key, value in matrix.items() if key != "predicted"}
    return seen | {f"predicted_{key}": matrix["predicted"][key] for key in _THEORY}


def _matrix(flat: Mapping[str, Any]) -> dict[str, Any]:
    seen = {key: value for key, value in flat.items() if not key.startswith("predicted_")}
    return {**seen, "predicted": {key: flat[f"predicted_{key}"] for key in _THEORY}}


@functools.cache
def _type():
    import pyarrow as pa

    number, numbers = pa.float64(), pa.list_(pa.float64())
    spectrum = [("shape", pa.list_(pa.int64())), ("noise_std", number)]
    spectrum += [(name, numbers) for name in ("clean", "noisy", "decoded")]
    spectrum += [(f"predicted_{key}", pa.int64() if key == "spikes" else number) for key in _THEORY]
    entry = [("parameter", pa.string()), ("alignment", pa.struct([("noisy", number), ("decoded", number)]))]
    entry += [("decoder", pa.string()), ("spectrum", pa.struct(spectrum))]
    return pa.list_(pa.struct(entry))

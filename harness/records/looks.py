"""What a run looked at by parameter, as a column of its curve file: JSON for each evaluated step, null for all others.

In memory, and in records of schema 1, it is three lists of rows by step in `diagnostics` (KINDS). One column of text: a table of
many small columns takes longer to open than the numbers in it take to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dpft.harness.errors import BadInput, first_line
from dpft.harness.records.schema import SCHEMA

COLUMN = "by_parameter"
KINDS = ("alignment_by_parameter", "decoder_by_parameter", "spectra")
Looks = dict[str, list[dict[str, Any]]]
_decode = msgspec.json.Decoder(dict[str, dict[str, Any]]).decode


def apart(record: Mapping[str, Any]) -> tuple[dict[str, Any], Looks]:
    """(the record as it is kept, what goes beside its curve)."""
    diagnostics = record["diagnostics"]
    kept = {key: value for key, value in diagnostics.items() if key not in KINDS}
    return {**record, "schema": SCHEMA, "diagnostics": kept}, {kind: diagnostics.get(kind, []) for kind in KINDS}


def column(looks: Looks, steps: Sequence[int]) -> list[str | None] | None:
    """The column for a curve of these steps; None where nothing was looked at. A step that failed has no row, and is left out."""
    seen: dict[int, dict[str, Any]] = {}
    for kind in KINDS:
        for row in looks[kind]:
            seen.setdefault(row["step"], {})[kind] = {key: value for key, value in row.items() if key != "step"}
    found = [json.dumps(seen[step], allow_nan=False, ensure_ascii=False) if step in seen else None for step in steps]
    return found if any(found) else None


def of(curve: Sequence[Mapping[str, Any]], run_id: str) -> Looks:
    """The three lists, of the rows of a curve that was read whole. Raises BadInput where its column is none of ours."""
    found: Looks = {kind: [] for kind in KINDS}
    try:
        for row in curve:
            seen = {} if row.get(COLUMN) is None else _decode(row[COLUMN])
            for kind in seen:
                found[kind].append({"step": row["step"], **seen[kind]})
    except Exception as problem:  # whatever it holds
        raise BadInput(
            f"The curve of run {run_id} is damaged in its column {COLUMN} ({first_line(problem)}); run it again."
        ) from problem
    return found

"""Packing: a folder's loose runs into the two files of harness/records/packed.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import BadInput
from dpft.harness.records.packed import CURVES, RECORDS, SCHEMA, Packed
from dpft.harness.records.store import Store, atomic

if TYPE_CHECKING:
    import polars

BLOCK = 64  # runs in a row group: what is read to get at one of them
PICKED = ("task", "model", "method", "epsilon", "lr", "seed")


def pack(folder: Path) -> tuple[int, int, int]:
    """Put all runs of `folder` into its two files and remove the loose ones: (runs, bytes before, bytes after).

    Nothing is removed before the two files are written, read back and found equal. Raises BadInput for damaged records or
    curves, and for records of other programs, which only `verify` understands.
    """
    store = Store(folder)
    ids = store.ids()
    if not ids:
        raise BadInput(f"There are no runs in {folder} to pack.")
    loose = [path for run_id in ids for path in (store.record_path(run_id), store.curve_path(run_id)) if path.exists()]
    both = [folder / RECORDS, folder / CURVES]
    before = sum(path.stat().st_size for path in [*loose, *both] if path.exists())
    rows, curves = [], []
    for run_id in ids:
        record = store.read(run_id)
        curve = store.curve(run_id, whole=True) if store.has_curve(run_id) else None
        rows.append(
            {"run_id": run_id, "status": record["status"]}
            | {name: record["spec"].get(name) for name in PICKED}
            | {"final": (record["result"] or {}).get("final"), "columns": None if curve is None else curve.columns}
            | {"record": store.text(run_id).decode()}
        )
        curves.append(curve)
    with atomic(folder / CURVES) as new_curves, atomic(folder / RECORDS) as new_records:
        _write(new_curves, _curve_tables(ids, curves))
        _write(new_records, _record_tables(rows))
        _check_equal(Packed(new_records, new_curves), rows, curves)
    for path in loose:
        path.unlink()
    return len(ids), before, sum(path.stat().st_size for path in both)


def _record_tables(rows: list[dict[str, Any]]):
    import polars

    floats = {name: polars.Float64 for name in ("epsilon", "lr", "final")}
    schema = {name: polars.String for name in rows[0]} | floats | {"seed": polars.Int64}
    schema["columns"] = polars.List(polars.String)
    for start in range(0, len(rows), BLOCK):
        yield polars.DataFrame(rows[start : start + BLOCK], schema=schema).to_arrow()


def _curve_tables(ids: list[str], curves: list[polars.DataFrame | None]):
    """One table per block of runs, all with the columns and types of all curves."""
    import polars

    named = [
        curve.select(polars.lit(run_id).alias("run_id"), polars.all())
        for run_id, curve in zip(ids, curves, strict=True)
        if curve is not None
    ]
    # types of the whole first, so that every block has them
    least = polars.DataFrame(schema={"run_id": polars.String, "step": polars.Int64, "metric": polars.Float64})
    empty = polars.concat([least, *(curve.clear() for curve in named)], how="diagonal_relaxed")
    for start in range(0, len(named) or 1, BLOCK):
        block = polars.concat([empty, *named[start : start + BLOCK]], how="diagonal_relaxed")
        yield block.to_arrow()


def _write(path: Path, tables) -> None:
    import pyarrow.parquet

    writer = None
    try:
        for table in tables:
            table = table.replace_schema_metadata({"dpft": str(SCHEMA)})
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd", compression_level=19)
            writer.write_table(table, row_group_size=len(table) or 1)
    finally:
        if writer is not None:
            writer.close()


def _check_equal(packed: Packed, rows: list[dict[str, Any]], curves: list[polars.DataFrame | None]) -> None:
    """That what was written is what was read: nothing else may be removed."""
    for row, curve in zip(rows, curves, strict=True):
        run_id = row["run_id"]
        again = packed.curve(run_id, whole=True)
        same = again is None if curve is None else again is not None and repr(again.rows()) == repr(curve.rows())
        if packed.text(run_id) != row["record"].encode() or not same:
            raise BadInput(f"Run {run_id} cannot be packed: its curve has other types than the others; move it away.")

"""Packing: a folder's loose runs into the two files of harness/records/packed.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
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
    empty = _layout(
        store, ids
    )  # the first of three times that all is read: in memory there is a block, however many there are
    with atomic(folder / CURVES) as new_curves, atomic(folder / RECORDS) as new_records:
        _write(new_curves, _curve_tables(store, ids, empty))
        _write(new_records, _record_tables(store, ids))
        _check_equal(store, ids, Packed(new_records, new_curves))
    for path in loose:
        path.unlink()
    return len(ids), before, sum(path.stat().st_size for path in both)


def _curves(store: Store, ids: list[str]) -> Iterator[tuple[str, polars.DataFrame | None]]:
    """Run id and curve, None where a run has none."""
    for run_id in store.ahead.each(ids, whole=True):
        yield run_id, store.curve(run_id, whole=True) if store.has_curve(run_id) else None


def _layout(store: Store, ids: list[str]) -> polars.DataFrame:
    """A table without rows that has the columns of all curves, each of a type that holds them all."""
    import polars

    least = polars.DataFrame(schema={"run_id": polars.String, "step": polars.Int64, "metric": polars.Float64})
    kinds: dict[str, polars.DataFrame] = {}
    for _, curve in _curves(store, ids):
        if curve is not None:
            kinds.setdefault(repr(curve.schema), curve.clear())
    return polars.concat([least, *kinds.values()], how="diagonal_relaxed")


def _curve_tables(store: Store, ids: list[str], empty: polars.DataFrame):
    """One table per block of runs, all with the columns and types of `empty`."""
    import polars

    named = (
        curve.select(polars.lit(run_id).alias("run_id"), polars.all())
        for run_id, curve in _curves(store, ids)
        if curve is not None
    )
    block = list(islice(named, BLOCK))
    yield polars.concat([empty, *block], how="diagonal_relaxed").to_arrow()
    while block := list(islice(named, BLOCK)):
        yield polars.concat([empty, *block], how="diagonal_relaxed").to_arrow()


def _record_tables(store: Store, ids: list[str]):
    import polars

    floats = {name: polars.Float64 for name in ("epsilon", "lr", "final")}
    schema = {name: polars.String for name in ("run_id", "status", *PICKED, "final", "columns", "record")}
    schema |= floats | {"seed": polars.Int64, "columns": polars.List(polars.String)}
    rows = (_row(store, run_id, curve) for run_id, curve in _curves(store, ids))
    while block := list(islice(rows, BLOCK)):
        yield polars.DataFrame(block, schema=schema).to_arrow()


def _row(store: Store, run_id: str, curve: polars.DataFrame | None) -> dict[str, Any]:
    record = store.read(run_id)
    return (
        {"run_id": run_id, "status": record["status"]}
        | {name: record["spec"].get(name) for name in PICKED}
        | {"final": (record["result"] or {}).get("final"), "columns": None if curve is None else curve.columns}
        | {"record": store.text(run_id).decode()}
    )


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


def _check_equal(store: Store, ids: list[str], packed: Packed) -> None:
    """That what was written is what was read: nothing else may be removed."""
    for run_id, curve in _curves(store, ids):
        again = packed.curve(run_id, whole=True)
        same = again is None if curve is None else again is not None and repr(again.rows()) == repr(curve.rows())
        if packed.text(run_id) != store.text(run_id) or not same:
            raise BadInput(f"Run {run_id} cannot be packed: its curve has other types than the others; move it away.")

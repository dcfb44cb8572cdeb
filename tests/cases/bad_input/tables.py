"""Bad tables: curves, packed studies and mirrors."""

from __future__ import annotations

import os
import random

from .case import Case
from .values import JSON
from .world import World


def curves(world: World, rng: random.Random) -> Case:
    """A curve that is no table, or has a column of another type, null, gone, or rows in disorder."""
    import polars

    folder = world.copied()
    path = rng.choice(sorted(folder.glob("*.parquet")))
    frame, column = polars.read_parquet(path), rng.choice(("step", "metric", "epsilon", "loss", "alignment_noisy"))
    how = rng.choice(("text", "null", "gone", "nan", "infinite", "list", "empty", "bytes", "folder", "fifo", "missing"))
    if how == "text":
        frame = frame.with_columns(polars.lit("x").alias(column))
    elif how == "null":
        frame = frame.with_columns(polars.lit(None).alias(column))
    elif how == "gone":
        frame = frame.drop(column)
    elif how in ("nan", "infinite"):
        frame = frame.with_columns(polars.lit(float(how[:3])).alias(column))
    elif how == "list":
        frame = frame.with_columns(polars.lit([1.0]).implode().alias(column))
    elif how == "empty":
        frame = frame.clear()
    path.unlink()
    if how == "bytes":
        path.write_bytes(b"PAR1 not a table PAR1")
    elif how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how != "missing":
        frame.write_parquet(path)
    figures = ("--figures", str(world.folder / "figures")) if rng.random() < 0.1 else ()  # a second each
    command = rng.choice(
        (
            ("report", str(folder), "--curves", *figures),
            ("report", str(folder), "--html", str(world.folder / "page.html")),
            ("merge", str(folder), str(world.folder / "all")),
            ("verify", str(folder)),
        )
    )
    return Case(
        "curves",
        f"{how} {column} in {command[0]} {command[-1][:20]}",
        command,
        may_accept=True,
        may_say_no=command[0] == "verify",
    )


def packed(world: World, rng: random.Random) -> Case:
    """A packed study of which a file is damaged, has a column of another type or none, or a record that is none."""
    import polars
    import pyarrow.parquet

    from dpft.harness.records.packing import pack

    folder = world.copied()
    pack(folder)
    path = rng.choice((folder / "records.parquet", folder / "curves.parquet"))
    table = pyarrow.parquet.read_table(path)
    how = rng.choice(("record", "columns", "text", "null", "gone", "none", "bytes", "cut", "folder", "fifo", "newer"))
    column, frame, schema = rng.choice(table.column_names), polars.from_arrow(table), table.schema.metadata
    if how == "record" and "record" in table.column_names:
        frame = frame.with_columns(record=polars.lit(str(rng.choice(JSON))))
    elif how == "columns" and "columns" in table.column_names:
        frame = frame.with_columns(columns=polars.lit(["step", "weight"]).implode())
    elif how == "text":
        frame = frame.with_columns(polars.lit("x").alias(column))
    elif how == "null":
        frame = frame.with_columns(polars.lit(None).alias(column))
    elif how == "gone":
        frame = frame.drop(column)
    elif how == "none":
        frame = frame.clear()
    content = path.read_bytes()
    path.unlink()
    if how in ("bytes", "cut"):
        path.write_bytes(b"PAR1" if how == "bytes" else content[: len(content) // 2])
    elif how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    else:
        schema = {b"dpft": b"99"} if how == "newer" else schema
        pyarrow.parquet.write_table(frame.to_arrow().replace_schema_metadata(schema), path)
    command = rng.choice(
        (
            ("report", str(folder), "--curves"),
            ("report", str(folder), "--html", str(world.folder / "page.html")),
            ("merge", str(folder), str(world.folder / "all")),
            ("pack", str(folder)),
            ("verify", str(folder)),
        )
    )
    what = f"{how} {column} of {path.name} in {command[0]}"
    return Case("packed", what, command, may_accept=True, may_say_no=command[0] == "verify")


def mirrors(world: World, rng: random.Random) -> Case:
    """A mirror whose parquet file has a column of another type, nulls, labels out of range, no rows, or is no file."""
    import polars

    from dpft.harness.runs import registry

    name = rng.choice(("sst2", "mrpc", "mnli", "cola"))
    task = registry.task(name)
    folder = world.folder / task.hub
    folder.mkdir(parents=True)
    columns = {column: [f"the film {i} was good" for i in range(20)] for column in task.columns}
    fine = polars.DataFrame({**columns, "label": [i % task.classes for i in range(20)]})
    fine.write_parquet(folder / f"{task.validation_split}.parquet")
    path, column = folder / "train.parquet", rng.choice(task.columns)
    labels = {
        "half": 0.5,
        "text": "1",
        "flag": True,
        "negative": -1,
        "large": task.classes,
        "huge": 2**62,
        "nan": float("nan"),
        "infinite": float("inf"),
        "null": None,
        "list": [1],
    }
    how = rng.choice(
        [*labels, "text null", "text number", "text list", "no rows", "no column", "bytes", "fifo", "folder", "loop"]
    )
    bad = fine
    if how in labels:
        value = (
            polars.Series([labels[how]] * 20, strict=False)
            if rng.random() < 0.5
            else polars.Series([*[None] * 19, labels[how]])
        )
        bad = fine.with_columns(value.alias("label"))
    elif how == "text null":
        bad = fine.with_columns(polars.lit(None, polars.String).alias(column))
    elif how == "text number":
        bad = fine.with_columns(polars.lit(7).alias(column))
    elif how == "text list":
        bad = fine.with_columns(polars.lit(["x"]).implode().alias(column))
    elif how == "no rows":
        bad = fine.clear()
    elif how == "no column":
        bad = fine.drop(column)
    if how == "bytes":
        path.write_bytes(b"PAR1")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    else:
        bad.write_parquet(path)
    return Case("mirrors", f"{name}: {how}", call=lambda: task().load(world.folder) and None)


TABLES = {"curves": curves, "packed": packed, "mirrors": mirrors}

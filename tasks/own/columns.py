"""Columns of a table as texts and as classes, every cell checked."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.tasks.own.tabular import Table

MOST = 1000  # classes; more are no classes but ids
SHOWN = 12  # columns that a message lists
WIDTH = 40  # characters of a name or value in a message
KINDS = {int: "numbers", float: "numbers", bool: "true and false", list: "lists", dict: "objects", bytes: "bytes"}
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one alone, and no file of text can hold it
WHOLE = re.compile(r"([+-]?\d+)(\.0*)?")


def texts(table: Table, columns: Mapping[str, str], words: Collection[str] = ()) -> list[dict[str, str]]:
    """Rows of text; `columns`: the table's column for each key. words: keys whose texts cannot all be numbers.

    Raises CannotRun for a column that is not there or no text, and for rows without text.
    """
    found = {key: _text(table, column, key in words) for key, column in columns.items()}
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def classes(table: Table, column: str, what: str = "classes") -> list[str]:
    """The class (what: the plural) of every row, by name. Whole numbers may be written 3 or 3.0. Raises CannotRun as `texts`."""
    values = [_class(value) for value in _present(table, column)]
    _complete(table, column, [value is None for value in values])
    numbers = [_number(value) for value in values]
    if None in numbers:
        return values
    for i, value in enumerate(values):
        if not WHOLE.fullmatch(value):
            raise CannotRun(
                f"The column {column} of {table.where} holds the number {short(value)} ({table.place(i)}); {what} must be names "
                "or whole numbers, so name another one, or round it."
            )
    return [str(int(WHOLE.fullmatch(value)[1])) for value in values]


def names(values: Sequence[str], where: str) -> tuple[str, ...]:
    """The different classes: whole numbers by size, others by their characters. Raises CannotRun unless they are classes."""
    found = set(values)
    numeric = all(WHOLE.fullmatch(value) for value in found)
    ordered = sorted(found, key=(lambda value: (int(WHOLE.fullmatch(value)[1]), value)) if numeric else None)
    if len(ordered) == 1:
        raise CannotRun(
            f"All labels of {where} are {short(ordered[0])}; there must be two classes or more to tell apart."
        )
    if len(ordered) > MOST or len(ordered) > max(20, len(values) // 2):
        raise CannotRun(
            f"{where} has {len(ordered)} different labels in {len(values)} rows (such as {short(ordered[0])}), which look like "
            "numbers or ids and not like classes; name another column."
        )
    return tuple(ordered)


def short(value: str) -> str:
    """A value as messages show it."""
    return repr(value if len(value) <= WIDTH else value[: WIDTH - 3] + "...")


def _present(table: Table, column: str) -> list[Any]:
    """The column's values. Raises CannotRun, with the columns that are there, where it is not."""
    if column not in table.columns:
        near = difflib.get_close_matches(column, table.columns, n=1, cutoff=0.5)
        listed = ", ".join(short(name)[1:-1] for name in table.columns[:SHOWN])
        more = f" and {len(table.columns) - SHOWN} more" if len(table.columns) > SHOWN else ""
        hint = f"did you mean {near[0]!r}?" if near else "name one of them."
        raise CannotRun(f"{table.where} has no column {column}; it has {listed}{more}: {hint}")
    if not table.size:
        raise CannotRun(f"{table.where} has no rows; put the data there.")
    return table.values(column)


def _text(table: Table, column: str, words: bool) -> list[str]:
    values = _present(table, column)
    for i, value in enumerate(values):
        if not isinstance(value, str) and not _missing(value):
            kind = KINDS.get(type(value), type(value).__name__)
            raise CannotRun(
                f"The column {column} of {table.where} holds {kind} ({table.place(i)}), not text; name another one."
            )
    _complete(table, column, [_missing(value) or not value.strip() for value in values])
    for i, value in enumerate(values):
        if not value.isascii() and SURROGATE.search(value):
            raise CannotRun(
                f"{table.where} has half a character ({table.place(i)}), as cut emoji have; write it again."
            )
    if words and all(_number(value) is not None for value in values):
        raise CannotRun(
            f"The column {column} of {table.where} holds numbers only (such as {short(values[0])}), not text; name another."
        )
    return values


def _complete(table: Table, column: str, lacking: Sequence[bool]) -> None:
    if count := sum(lacking):
        first = table.place(list(lacking).index(True))
        rows = "a row" if count == 1 else f"{count} rows"
        raise CannotRun(
            f"{table.where} has {rows} without {column}, the first in {first}; every row needs one, so fill it in or take the "
            "row out."
        )


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _class(value: Any) -> str | None:
    """A label as text; None where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    text = "" if value is None else str(value).strip()
    return None if text == "" or text.lower() == "nan" else text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

"""What rows are called where there is little room: only what differs, in few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpft.harness.report.rows import Row
from dpft.harness.report.text import told
from dpft.harness.runs import registry

SILENT = {"seed", "lr", "options", "clip_groups"}  # each method has its best rate; groups follow the clipping rule


def labels(rows: Sequence[Row], full: Sequence[str]) -> list[str]:
    """A short name for each row, and its full one where two would be called the same.

    The method, where there are several, and those settings in which rows of one method differ: words of the run by their value
    alone, numbers and options of the method with their names, what is not set not at all.
    """
    one_method = len({row.method for row in rows}) == 1
    short = []
    for row in rows:
        same = [other for other in rows if other.method == row.method]
        keys = _telling([key for key in _settings(row) if key not in SILENT], same)
        said = [_said(key, _settings(row)[key], _usual(key, same), key in row.spec) for key in keys]
        kept = [text for text in said if text] or ([told(_settings(row)[keys[0]])] if keys and one_method else [])
        if one_method and kept:
            short.append(", ".join(kept))
        else:
            short.append(row.method + (f" ({', '.join(kept)})" if kept else ""))
    twice = {name for name, count in Counter(short).items() if count > 1}
    return [long if name in twice else name for name, long in zip(short, full, strict=True)]


def _telling(keys: list[str], rows: Sequence[Row]) -> list[str]:
    """Those of `keys` that are needed to tell the rows apart: of settings that go together the last."""
    kept = [key for key in keys if len({_settings(r).get(key) for r in rows}) > 1]

    def kinds(some: list[str]) -> int:
        return len({tuple(_settings(r).get(key) for key in some) for r in rows})

    for key in list(kept):
        without = [other for other in kept if other != key]
        if kinds(without) == kinds(kept):
            kept = without
    return kept


def _settings(row: Row) -> dict[str, Any]:
    """All settings of a row that can be compared, the method's own among them."""
    known = registry.methods().get(row.method)
    usual = known.options if known is not None else {}
    return {k: v for k, v in {**usual, **row.spec, **row.spec["options"]}.items() if not isinstance(v, (dict, list))}


def _usual(key: str, rows: Sequence[Row]) -> Any:
    """The value of a word that goes without saying: the one that most rows have."""
    value, count = Counter(_settings(row).get(key) for row in rows).most_common(1)[0]
    return value if count > len(rows) / 2 else None


def _said(key: str, value: Any, usual: Any, of_run: bool) -> str:
    if value is None or (isinstance(value, str) and value == usual):
        return ""
    if isinstance(value, str):
        return told(value if of_run else f"{key.replace('_', ' ')} {value}")
    return f"{told(key.replace('_', ' '))} {value:g}" if not isinstance(value, bool) else told(key) if value else ""

"""What rows are called where there is little room: only what differs, in few words."""

from __future__ import annotations

from collections import Counter, defaultdict
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
    of_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    settings = [_settings(row) for row in rows]
    for row, own in zip(rows, settings, strict=True):
        of_method[row.method].append(own)
    telling = {method: _telling(found) for method, found in of_method.items()}
    short = []
    for row, own in zip(rows, settings, strict=True):
        said = [_said(key, own.get(key), usual, key in row.spec) for key, usual in telling[row.method].items()]
        kept = [text for text in said if text]
        if len(of_method) > 1:
            short.append(row.method + (f" ({', '.join(kept)})" if kept else ""))
        else:  # where nothing is left to say, all is as usual: the first of it
            usual = next((told(own.get(key)) for key in telling[row.method]), row.method)
            short.append(", ".join(kept) or usual)
    twice = {name for name, count in Counter(short).items() if count > 1}
    return [long if name in twice else name for name, long in zip(short, full, strict=True)]


def _telling(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings that are needed to tell the rows of one method apart, of those that go together the last -> the value that goes
    without saying: the one that most rows have, None where there is none."""
    keys = [key for key in dict.fromkeys(key for own in rows for key in own) if key not in SILENT]

    def kinds(some: list[str]) -> int:
        return len({tuple(own.get(key) for key in some) for own in rows})

    kept = [key for key in keys if kinds([key]) > 1]
    for key in list(kept):
        without = [other for other in kept if other != key]
        if kinds(without) == kinds(kept):
            kept = without
    counted = {key: Counter(own.get(key) for own in rows).most_common(1)[0] for key in kept}
    return {key: value if count > len(rows) / 2 else None for key, (value, count) in counted.items()}


def _settings(row: Row) -> dict[str, Any]:
    """All settings of a row that can be compared, the method's own among them."""
    known = registry.methods().get(row.method)
    usual = known.options if known is not None else {}
    return {k: v for k, v in {**usual, **row.spec, **row.spec["options"]}.items() if not isinstance(v, (dict, list))}


def _said(key: str, value: Any, usual: Any, of_run: bool) -> str:
    if value is None or (isinstance(value, str) and value == usual):
        return ""
    if isinstance(value, str):
        return told(value if of_run else f"{key.replace('_', ' ')} {value}")
    return f"{told(key.replace('_', ' '))} {value:g}" if not isinstance(value, bool) else told(key) if value else ""

"""What there is in the data of a task, for `dpft describe`: sizes, classes, lengths, one example. On a terminal, in no record."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from dpft.tasks.base import Data, Task

SHOWN = 300  # characters of a text
LISTED = 20  # classes


def found(task: Task, data_dir: Path | None) -> dict[str, Any]:
    """Of the data of `task` as it is set; the first training row is the example. Raises CannotRun as `Task.load`."""
    about, data = task.about(data_dir), task.load(data_dir)
    if not data.train:
        return about
    first = data.train[0]
    texts = [key for key, value in first.items() if isinstance(value, str)]
    return {
        **about,
        "training examples": len(data.train),
        "validation examples": len(data.validation),
        **({key: round(value, 4) for key, value in task.judged(data).items()} if data.classes else {}),
        **({"classes": _classes(data)} if isinstance(first.get("label"), int) else {}),
        **({"characters": {key: _lengths([len(row[key]) for row in data.train]) for key in texts}} if texts else {}),
        **({"examples of each user": _users(data)} if data.users else {}),
        **({"notes": list(data.notes)} if data.notes else {}),
        "example": {key: _shown(value) for key, value in first.items() if key != "index"},
    }


def _classes(data: Data) -> dict[str, str]:
    """How many examples each class has; of many classes the largest."""
    train, validation = (Counter(row["label"] for row in rows) for rows in (data.train, data.validation))
    labels = sorted(set(train) | set(validation) | set(range(len(data.classes))))
    if len(labels) > LISTED:
        labels = [label for label, _ in train.most_common(LISTED)]
    named = {label: f"{label}: {data.classes[label]}" if data.classes else str(label) for label in labels}
    return {named[label]: f"{train[label]} + {validation[label]} for validation" for label in labels}


def _users(data: Data) -> str:
    """How many users there are, and how many training examples each has."""
    counts = [*Counter(data.users).values()]
    return f"{_lengths(counts)}, of {len(counts):,} users"


def _lengths(lengths: list[int]) -> str:
    return f"{min(lengths)} to {max(lengths)}, median {statistics.median_low(lengths)}"


def _shown(value: Any) -> Any:
    """A value as a person reads it: a long text cut, an array as its shape."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    if hasattr(value, "shape"):
        return f"{value.dtype} array of {' x '.join(str(side) for side in value.shape)}"
    return value if isinstance(value, bool | int | float) else str(value)[:SHOWN]

"""Reading many records of which some are damaged: all are looked at, and the first is named; or each is, and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dpft.harness.errors import BadInput

PassedOver = Callable[[str], None] | None
Counted = Callable[[Sequence[str]], Iterator[str]]  # `iter`, or one that shows how far it is


def readable(run_ids: Iterable[str], read: Callable[[str], Any], passed_over: PassedOver = None) -> Iterator[Any]:
    """`read` of every run id; what it raises BadInput for is told to `passed_over`.

    Without that, BadInput says at the end which was the first and how many there are.
    """
    bad: list[str] = []
    for run_id in run_ids:
        try:
            found = read(run_id)
        except BadInput as error:
            (bad.append if passed_over is None else passed_over)(str(error))
            continue
        if not bad:
            yield found
    if bad:
        many = f" ({len(bad)} such records are there; this is the first)" if len(bad) > 1 else ""
        raise BadInput(f"{bad[0].rstrip('.')}, or go on without it: --skip-damaged{many}.")

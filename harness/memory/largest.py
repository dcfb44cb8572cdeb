"""The largest batch that fits."""

from __future__ import annotations

import re
from dataclasses import replace

from dpft.harness.errors import BadInput
from dpft.harness.memory.prediction import Answer, Question, predict

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST = 1 << 16


def parse_size(text: str) -> int:
    """Bytes of `80GiB`, `24 GB` or `1e9`. Raises BadInput."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmg]i?b|b)?\s*", text, re.IGNORECASE)
    try:
        size = int(float(found[1]) * UNITS[(found[2] or "").upper()])
    except (TypeError, ValueError, OverflowError):
        raise BadInput(f"{text!r} is no amount of memory; write for example 80GiB.") from None
    if size <= 0:
        raise BadInput(f"{text!r} is no amount of memory; write for example 80GiB.")
    return size


def largest(question: Question, limit: int) -> tuple[int, Answer | None]:
    """(largest batch whose predicted peak is at most `limit` bytes, its answer); (0, None) where one example is too much.

    Peaks grow nearly linearly with the batch: a secant finds the place, and predictions on both sides of it confirm it.
    At most MOST examples.
    """
    low, high, known = 0, MOST + 1, {}

    def total(batch: int) -> int:
        if batch not in known:
            known[batch] = predict(replace(question, batch=batch))
        return known[batch].total

    guess = 1
    while high - low > 1:
        if total(guess) <= limit:
            low = guess
        else:
            high = guess
        if low == 0:
            guess = max(1, high // 2)
            if high == 1:
                return 0, None
            continue
        other = high if high in known else max((b for b in known if b < low), default=0)
        if other:
            slope = (total(other) - total(low)) / (other - low)
            guess = low + int((limit - total(low)) / slope) if slope > 0 else 2 * low
            if guess == low and total(low) <= limit:
                guess = low + 1
        else:
            guess = 2 * low
        guess = min(max(guess, low + 1), high - 1)
    return low, known[low]

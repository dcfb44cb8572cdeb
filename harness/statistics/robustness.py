"""How much a method minds its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpft.harness.errors import BadInput


@dataclass(frozen=True)
class Width:
    """octaves: log2(high/low) of the learning rates within the margin of the best; open: whether the grid ends there.

    An open width is a lower bound: the next rate outside the grid may be as good.
    """

    octaves: float
    low: float
    high: float
    best: float
    open: bool


def lr_width(scores: Mapping[float, float], margin: float, higher_is_better: bool = True) -> Width:
    """The run of neighbouring learning rates around the best whose score is within `margin` of it.

    scores: learning rate -> mean score. Raises BadInput for an empty grid or a rate that is not positive.
    """
    if not scores or min(scores) <= 0:
        raise BadInput("The width of a learning rate grid needs positive learning rates; make runs with --lr a,b,c.")
    rates = sorted(scores)
    sign = 1 if higher_is_better else -1
    best = max(range(len(rates)), key=lambda i: sign * scores[rates[i]])
    limit = sign * scores[rates[best]] - margin - 1e-12  # rounding of differences of accuracies
    low = high = best
    while low > 0 and sign * scores[rates[low - 1]] >= limit:
        low -= 1
    while high < len(rates) - 1 and sign * scores[rates[high + 1]] >= limit:
        high += 1
    return Width(
        math.log2(rates[high] / rates[low]), rates[low], rates[high], rates[best], low == 0 or high == len(rates) - 1
    )


def uneven_grids(grids: Mapping[str, Sequence[float]]) -> str | None:
    """None when every method tried as many learning rates, else one sentence that says who tried how many."""
    counts = {name: len(set(grid)) for name, grid in grids.items()}
    if len(set(counts.values())) <= 1:
        return None
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"Methods did not try the same number of learning rates ({said}); more tries find better ones by chance."

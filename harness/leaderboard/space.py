"""What is searched for each method: points of one low-discrepancy sequence, in a space that is as wide for one as for another."""

from __future__ import annotations

import math
from typing import Any

from dpft.harness.runs import registry

WIDTH = 10.0  # a method's own learning rate is searched a factor of this up and down, unless its `space` says otherwise
DIGITS = 2  # significant ones of a searched value
SEED = 0  # of the scrambling; all methods have the same points


def space(method: str, lr: float | None = None) -> dict[str, tuple[float, float]]:
    """Setting -> (least, greatest), each on a logarithmic scale. lr: where to look, instead of about the method's own."""
    kind = registry.method(method)
    lr = lr or kind.defaults.get("lr", 1e-3)
    return {"lr": (lr / WIDTH, lr * WIDTH), **kind.space}


def points(method: str, trials: int, lr: float | None = None) -> list[dict[str, Any]]:
    """`trials` choices of settings: the method's defaults (or `lr`) first, then points of a scrambled Halton sequence."""
    if trials <= 1:
        return [{}]
    from scipy.stats import qmc

    searched = space(method, lr)
    unit = qmc.Halton(len(searched), scramble=True, rng=SEED).random(trials - 1)
    return [{}] + [
        {
            key: _rounded(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
            for (key, (low, high)), share in zip(searched.items(), row, strict=True)
        }
        for row in unit.tolist()
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

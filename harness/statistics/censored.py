"""Steps and epsilon to a threshold, where a run that never got there counts as infinitely late, not as absent.

A run of which the evaluations cannot tell (harness/statistics/thresholds.py) is None: neither late nor absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpft.harness.errors import BadInput
from dpft.harness.statistics.thresholds import crossing


@dataclass(frozen=True)
class Reached:
    """step: of the first evaluation that holds, infinite when censored; epsilon: spent by then, None where there is none."""

    step: float
    epsilon: float | None


def to_threshold(
    steps: Sequence[int],
    values: Sequence[float],
    epsilons: Sequence[float | None],
    target: float,
    higher_is_better: bool = True,
) -> Reached | None:
    """Where one curve reaches `target` (rule: harness/statistics/thresholds.py); None where its evaluations cannot tell.

    The three sequences have one entry per evaluation.
    """
    hit = crossing(steps, values, target, higher_is_better)
    if not hit.known:
        return None
    if hit.step is None:
        return Reached(math.inf, None)
    return Reached(float(hit.step), epsilons[list(steps).index(hit.step)])


def median_reached(found: Sequence[Reached | None], earliest: float = 0.0) -> Reached | None:
    """The upper median by step: infinite as soon as half of the runs are censored, so that failures are not hidden.

    None where it depends on runs that are unknown: it must be the same whether all of these got there at step `earliest`, before
    which they are known not to have, or never.
    """
    if not found:
        raise BadInput("A median needs at least one run; make some with `dpft run`.")

    def median(unknown: float) -> Reached:
        filled = [Reached(unknown, None) if one is None else one for one in found]
        return sorted(filled, key=lambda one: one.step)[len(filled) // 2]

    late = median(math.inf)
    return late if median(earliest).step == late.step else None


def win_probability(first: Sequence[float], second: Sequence[float]) -> float:
    """Probability that a run of `first` takes fewer steps than one of `second`, ties half (two censored runs tie).

    All pairs are compared, as in the Mann-Whitney statistic; .5 where neither is faster.
    """
    a, b = np.asarray(first, dtype=float)[:, None], np.asarray(second, dtype=float)[None, :]
    if not a.size or not b.size:
        raise BadInput("A win probability needs runs of both methods; make some with `dpft run`.")
    return float(np.mean((a < b) + 0.5 * (a == b)))


def restricted_mean(steps: Sequence[float], horizon: float) -> float:
    """Mean of min(steps, horizon): the mean time spent below the threshold within `horizon` steps (finite, no run left out)."""
    return float(np.mean(np.minimum(np.asarray(steps, dtype=float), horizon)))

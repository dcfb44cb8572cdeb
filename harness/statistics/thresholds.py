"""Steps to threshold: the first evaluation from which on a smoothed curve has reached a value, censored, or unknown."""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 3  # evaluations in the trailing mean
PATIENCE = 2  # consecutive evaluations that must hold
FEWEST = PATIENCE + 1  # evaluations: with fewer, "not reached" and "reached at the end" look the same
RULE = 2  # how new records are made; those without `threshold_rule` were made by rule 1


@dataclass(frozen=True)
class Crossing:
    """step: where the threshold was reached, None when it was not (then `censored`) or when it cannot be told.

    censored: the run is known not to have reached it by its last step. known: whether the evaluations can tell at all; where
    they cannot, step is None and censored is False.
    """

    step: int | None
    censored: bool
    known: bool = True


UNKNOWN = Crossing(None, False, False)


def smoothed(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Trailing mean over at most `window` evaluations."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def crossing(
    steps: Sequence[int], values: Sequence[float], threshold: float, higher_is_better: bool = True, rule: int = RULE
) -> Crossing:
    """First step whose smoothed value reaches `threshold` at `PATIENCE` evaluations in a row (the first of them counts).

    Rule 2: unknown with fewer than `FEWEST` evaluations, and where the curve is there at its end, but too late for the rule to
    confirm it. Rule 1 calls both censored; it is kept to recompute what old records hold.
    """
    sign = 1 if higher_is_better else -1
    holds = [sign * value >= sign * threshold for value in smoothed(values)]
    if rule >= 2 and len(holds) < FEWEST:
        return UNKNOWN
    for i in range(len(holds) - PATIENCE + 1):
        if all(holds[i : i + PATIENCE]):
            return Crossing(steps[i], False)
    if rule >= 2 and (holds[-1] or sign * values[-1] >= sign * threshold):
        return UNKNOWN
    return Crossing(None, True)


def relative_target(best: float, fraction: float, chance: float | None = None) -> float:
    """`fraction` of the best value; with `chance`, of the way from chance to it (the chance-corrected scale)."""
    base = 0.0 if chance is None else chance
    return base + fraction * (best - base)

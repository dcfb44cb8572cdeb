"""Steps to threshold: the first evaluation from which on a smoothed curve has reached a value, or censored."""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 3  # evaluations in the trailing mean
PATIENCE = 2  # consecutive evaluations that must hold


@dataclass(frozen=True)
class Crossing:
    """step: where the threshold was reached, None when it was not; then the run is censored at its last step."""

    step: int | None
    censored: bool


def smoothed(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Trailing mean over at most `window` evaluations."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def crossing(
    steps: Sequence[int], values: Sequence[float], threshold: float, higher_is_better: bool = True, rule: int = 1
) -> Crossing:
    """First step whose smoothed value reaches `threshold` at `PATIENCE` evaluations in a row (the first of them counts)."""
    sign = 1 if higher_is_better else -1
    holds = [sign * value >= sign * threshold for value in smoothed(values)]
    for i in range(len(holds) - PATIENCE + 1):
        if all(holds[i : i + PATIENCE]):
            return Crossing(steps[i], False)
    return Crossing(None, True)


def relative_target(best: float, fraction: float, chance: float | None = None) -> float:
    """`fraction` of the best value; with `chance`, of the way from chance to it (the chance-corrected scale)."""
    base = 0.0 if chance is None else chance
    return base + fraction * (best - base)

"""What a run releases when: the shares of each step's budget that method and clipping rule declare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.shares import checked

GRADIENT = "gradient"  # the release that a clipping rule goes with

# (first step, step after the last, share by name) of every stretch of equal steps, from 0
Schedule = tuple[tuple[int, int, dict[str, float]], ...]


def shares(method: Any, step: int) -> dict[str, float]:
    """Share of the budget of each release of a step, by name: the method's, and within `gradient`'s those of its clipping rule.

    method: with `releases(step)`, and its ClippingRule in `rule`. Raises BadInput, naming the step, where they do not add up.
    """
    return _together(_called(method), step, method.releases(step), method.rule)


def schedule(method: Any, rule: Any, steps: int) -> Schedule:
    """The shares of all `steps` steps of a run; neighbours with the same are one stretch. Raises BadInput as `shares`."""
    found: list[tuple[int, int, dict[str, float]]] = []
    last = None
    for step in range(steps):
        declared = method.releases(step)
        if last is None or declared != last:
            together = _together(_called(method), step, declared, rule)
            last = dict(declared)
            if not found or found[-1][2] != together:
                found.append((step, step, together))
        found[-1] = (found[-1][0], step + 1, found[-1][2])
    return tuple(found)


def kind_starts(method: Any) -> tuple[int, ...]:
    """The steps at which another kind of step begins, from 0."""
    kinds = [method.kind(step) for step in range(method.steps)]
    return tuple(step for step, kind in enumerate(kinds) if step == 0 or kind != kinds[step - 1])


def _together(name: str, step: int, declared: Any, rule: Any) -> dict[str, float]:
    found = checked(declared, f"Step {step} of {name}")
    beside: Mapping[str, float] = rule.shares() if GRADIENT in found else {}
    if not beside:
        return found
    called = _called(rule)
    if clash := sorted(found.keys() & beside.keys()):
        raise BadInput(f"{name} and the clipping rule {called} both release {clash[0]!r}; rename one of them.")
    rest = 1 - math.fsum(share for share in beside.values() if isinstance(share, (int, float)))
    parts = checked({**beside, GRADIENT: rest}, f"The clipping rule {called}")
    whole = found[GRADIENT]
    found |= {part: whole * share for part, share in parts.items()}
    return checked(found, f"Step {step} of {name} with the clipping rule {called}")


def _called(part: Any) -> str:
    """Its name; the base class, which `dpft bench` trains with, has none."""
    return getattr(part, "name", type(part).__name__)

"""What a run releases when: the shares that method and clipping rule declare."""

from __future__ import annotations

from typing import Any

GRADIENT = "gradient"  # the release that a clipping rule goes with


def shares(method: Any, step: int) -> dict[str, float]:
    """Share of the budget of each release of a step, by name: the method's, and within `gradient`'s the clipping rule's."""
    found = dict(method.releases(step))
    if GRADIENT in found:
        whole, beside = found[GRADIENT], method.rule.shares()
        found[GRADIENT] = whole * (1 - sum(beside.values()))
        found |= {name: whole * share for name, share in beside.items()}
    return found

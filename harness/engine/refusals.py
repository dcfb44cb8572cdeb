"""What is said where an engine and plain autograd differ: what may be the cause, and what to do."""

from __future__ import annotations

from dpft.harness.engine.base import Engine
from dpft.harness.errors import CannotRun


def disagreement(engine: Engine, what: str) -> CannotRun:
    return CannotRun(f"An example {what}: {causes(engine)}; {advice(engine)}.")


def causes(engine: Engine) -> str:
    if not engine.batched:
        return "what the model makes of it depends on its padding, or on what the model has seen before"
    return (
        "the model mixes examples, is random in training mode, depends on padding or on what it has seen before, or has a layer "
        "whose gradients are taken wrongly"
    )


def advice(engine: Engine, mixes: bool = False) -> str:
    others = {"factored": " or use --engine reference", "opacus": " or use --engine factored or reference"}
    if mixes:
        others["opacus"] = others["factored"]
    return f"mend the model{others.get(engine.name, '')}"

"""What the ranks of a run tell one another around a step, beside its sums (ranks.py). A run in one process has nobody to tell."""

from __future__ import annotations

import time
from typing import Any

from dpft.harness.records.digest import digest
from dpft.harness.train.parts import Run, Setup


def late(setup: Setup) -> bool:
    """Whether the deadline has passed for any of them."""
    if setup.deadline is None:
        return False
    return any(setup.ranks.everyones(time.monotonic() > setup.deadline))


def at_start(setup: Setup, run: Run) -> None:
    """Raises CannotRun unless all are at the same step, with the same data and weights."""
    if setup.ranks.count > 1:
        setup.ranks.alike(f"{run.progress.step} {run.progress.chain} {_state(setup)}", "data, checkpoint or weights")


def after_step(setup: Setup, run: Run, row: dict[str, Any]) -> None:
    """Put together what the step cost: processors' time in sum, and of memory what the rank with the most has.

    Raises CannotRun where the ranks part: what they released in every step, and their weights in the steps 1, 2, 4, 8, ... and
    before they are evaluated.
    """
    ranks, cost, step = setup.ranks, run.cost, run.progress.step
    if ranks.count == 1:
        return
    spent = ranks.everyones((cost.processor_seconds[-1], cost.peak_bytes))
    cost.processor_seconds[-1] = None if spent[0][0] is None else sum(seconds for seconds, _ in spent)
    cost.peak_bytes = max((peak for _, peak in spent), key=lambda peak: sum(peak.values()))
    looked = step.bit_count() == 1 or step % setup.spec.eval_every == 0 or step + run.progress.lost == setup.spec.steps
    mark = f"{row['release']} {_state(setup) if looked else ''}"
    ranks.alike(mark, f"releases and weights after step {step}")


def _state(setup: Setup) -> str:
    """A digest of the weights, and of what method and clipping rule carry from step to step."""
    held = {"parameter": setup.parameters, "method": setup.method.state_dict(), "rule": setup.method.rule.state_dict()}
    return digest({f"{kind}|{name}": tensor for kind, own in held.items() for name, tensor in own.items()})

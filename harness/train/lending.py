"""`--shard-model`: of what a run does not train each rank holds a part, and lends it to the others (harness/engine/parted.py)."""

from __future__ import annotations

import torch
from torch import nn

from dpft.harness import padding
from dpft.harness.engine import parted
from dpft.harness.engine.base import Batch, Loss
from dpft.harness.errors import CannotRun
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import ranks
from dpft.tasks.base import Prepared


def part(model: nn.Module, spec: RunSpec, device: torch.device) -> None:
    """Leave this rank its part of what is frozen, on `device`: the whole of it may not fit there. All ranks call it.

    Raises CannotRun where nothing is frozen.
    """
    together = ranks.here()
    made = parted.part(model, device, together.number, together.count, together.gather)
    if made is None:
        raise CannotRun(
            f"{spec.method} trains all of {spec.model}, and --shard-model shares out what is frozen; leave it out, or take a "
            "method that trains a small part, as dp-lora does."
        )
    together.lend([block.own for block in made.blocks])


def light(loss: Loss, model: nn.Module, prepared: Prepared, device: torch.device, spec: RunSpec) -> Loss:
    """`loss`, of which autograd keeps no weights that are parted; as it is where none are.

    Raises CannotRun where the model reads weights outside of the calls of the layers that hold them: they are NaN there.
    """
    blocks = parted.of(model)
    if blocks is None:
        return loss

    def lighter(model: nn.Module, batch: Batch) -> torch.Tensor:
        with blocks.saving():
            return loss(model, batch)

    few = padding.sent(prepared.collate(prepared.validation[:2]), device)
    with torch.no_grad():
        if not torch.isfinite(lighter(model, few)).all():
            raise CannotRun(
                f"The model {spec.model} computes nothing finite where its weights are gathered layer by layer: it reads some of "
                "them outside of their layers; leave out --shard-model."
            )
    return lighter

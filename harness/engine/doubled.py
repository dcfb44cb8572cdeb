"""A question asked of a model in float64 where float32 says no: what rounding alone explains is then gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dpft.harness.engine.base import Batch
from dpft.harness.errors import CannotRun


@contextmanager
def doubled(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of floating point are float64 inside; afterwards they are the very tensors they were."""
    parameters = {p: p.data for p in model.parameters() if p.is_floating_point()}
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    try:
        for p, own in parameters.items():
            p.data = own.double()
        for holder, name, own in buffers:
            holder[name] = own.double()
        yield
    finally:
        for p, own in parameters.items():
            p.data = own
        for holder, name, own in buffers:
            holder[name] = own


def at_least_in_double(
    ask: Callable[[Batch, Sequence[Batch] | None], None],
    model: nn.Module,
    batch: Batch,
    alone: Sequence[Batch] | None,
    half: bool,
) -> None:
    """Ask `ask(batch, alone)`, and where its answer is no, with CannotRun, ask in float64; raises the first answer.

    half: layers compute in half precision, so their own answer stands; as where a model holds anything but float32.
    """
    try:
        ask(batch, alone)
    except CannotRun as refusal:
        if half or {p.dtype for p in model.parameters()} != {torch.float32}:
            raise
        try:
            with doubled(model):
                ask(_in_double(batch), alone and [_in_double(example) for example in alone])
        except Exception:  # no again, or a model or a loss that takes no float64
            raise refusal from None


def _in_double(batch: Batch) -> Batch:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}

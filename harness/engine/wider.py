"""A question asked of a model in wider numbers where narrow ones say no: what rounding alone explains is then gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from dpft.harness.engine import parted
from dpft.harness.engine.base import Batch
from dpft.harness.errors import CannotRun

Ask = Callable[[Batch, Sequence[Batch] | None, bool], None]  # (batch, alone, half)
_FULL: ContextVar[bool] = ContextVar("full", default=False)


def full() -> bool:
    """Whether layers are to compute in the numbers that their parameters are, whatever the run's precision is."""
    return _FULL.get()


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of floating point are of `dtype` inside; afterwards they are the very tensors they were."""
    parameters = {p: p.data for p in model.parameters() if p.is_floating_point() and parted.held(p) is p}
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    before = _FULL.set(True)
    try:
        for p, own in parameters.items():
            p.data = own.to(dtype)
        for holder, name, own in buffers:
            holder[name] = own.to(dtype)
        with parted.widened(model, dtype):
            yield
    finally:
        for p, own in parameters.items():
            p.data = own
        for holder, name, own in buffers:
            holder[name] = own
        _FULL.reset(before)


def asked_again(
    ask: Ask,
    singly: Callable[[], None],
    model: nn.Module,
    batch: Batch,
    alone: Sequence[Batch] | None,
    half: bool,
) -> None:
    """Ask `ask(batch, alone, half)`, and where its answer is no, with CannotRun, ask in wider numbers; raises the first answer.

    Half precision is asked again in fp32, and fp32 in float64. half: layers compute in half precision, by autocast or by their
    parameters. singly: what has to hold in half precision, too, where fp32 says yes.
    """
    try:
        ask(batch, alone, half)
    except CannotRun as refusal:
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if not half and kinds != {torch.float32}:
            raise
        wider = torch.float32 if half else torch.float64
        try:
            if half:
                singly()
            with widened(model, wider):
                again = _of(batch, wider), alone and [_of(example, wider) for example in alone]
                if half:
                    asked_again(ask, singly, model, *again, half=False)
                else:
                    ask(*again, False)
        except Exception:  # no again, or a model or a loss that takes no such numbers
            raise refusal from None


def _of(batch: Batch, dtype: torch.dtype) -> Batch:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

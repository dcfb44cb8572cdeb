"""Blocks of a transformer that keep their input alone and run again in the backward pass: less memory for more time."""

from __future__ import annotations

import torch
from torch import nn

from dpft.harness.engine.base import Batch, Loss
from dpft.harness.engine.layouts import real_tensors
from dpft.harness.errors import CannotRun

CLOSE = 1e-4  # relative, in fp32; half precision computes the same twice


def enable(model: nn.Module, loss: Loss, batch: Batch, name: str) -> None:
    """From now on, in training. loss, batch: what it must not change. name: of the model, for messages.

    Raises CannotRun where the model has no such blocks, and where it would compute something else: transformers drops what a
    block finds in a cache, for example.
    """
    host = next(
        (module for module in model.modules() if getattr(module, "supports_gradient_checkpointing", False)), None
    )
    if host is None:
        raise CannotRun(f"The model {name} has no blocks that could run again; leave out --recompute.")
    before = _computed(model, host, loss, batch)
    if hasattr(host, "activation_checkpointing_enable"):  # of transformers 5, where the older name warns
        host.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        host.gradient_checkpointing_enable({"use_reentrant": False})
    host.disable_input_require_grads()  # hooks that reentrant checkpoints need, and the engine would have to look through
    after = _computed(model, host, loss, batch)
    if not all(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE) for a, b in zip(before, after, strict=True)):
        raise CannotRun(f"The model {name} computes something else where its blocks run again; leave out --recompute.")


def _computed(model: nn.Module, host: nn.Module, loss: Loss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer returns first, and the losses: those of a head that starts at zero say nothing of the rest."""
    seen: list[torch.Tensor] = []
    handle = host.register_forward_hook(lambda module, given, output: seen.append(real_tensors(output)[0].detach()))
    training = model.training
    model.train()
    try:
        losses = loss(model, batch).detach()
    finally:
        model.train(training)
        handle.remove()
    return seen[-1], losses

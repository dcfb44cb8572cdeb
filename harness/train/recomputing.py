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
    hosts = [module for module in model.modules() if getattr(module, "supports_gradient_checkpointing", False)]
    if not hosts:
        raise CannotRun(f"The model {name} has no blocks that could run again; leave out --recompute.")
    before, host = _computed(model, hosts, loss, batch), hosts[0]
    if hasattr(host, "activation_checkpointing_enable"):  # of transformers 5, where the older name warns
        host.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        host.gradient_checkpointing_enable({"use_reentrant": False})
    host.disable_input_require_grads()  # hooks that reentrant checkpoints need, and the engine would have to look through
    after = _computed(model, hosts, loss, batch)
    if not all(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE) for a, b in zip(before, after, strict=True)):
        raise CannotRun(f"The model {name} computes something else where its blocks run again; leave out --recompute.")


def _computed(model: nn.Module, hosts: list[nn.Module], loss: Loss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the outermost transformer that is called returns first, and the losses: those of a head that starts at zero say
    nothing of the rest. A language model with its head may be held and not called: the task calls what is in it."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, given: tuple, output) -> None:
        seen.append(real_tensors(output)[0].detach())

    handles = [host.register_forward_hook(hook) for host in hosts]
    training = model.training
    model.train()
    try:
        losses = loss(model, batch).detach()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen[-1], losses

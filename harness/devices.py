"""A run's device: which card is current, how its memory is counted, and how numbers get there without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_card(device: torch.device | str) -> bool:
    """Whether work on the device is queued, so that whoever looks at a value waits for all of it."""
    return torch.device(device).type != "cpu"


def of(device: torch.device | str) -> Any:
    """`torch.cuda`, or what other kinds of cards have in its place."""
    return torch.get_device_module(device)


def current(device: torch.device | str) -> AbstractContextManager[Any]:
    """Inside, a card is the current one: events and questions that name no card are about it."""
    return of(device).device(torch.device(device)) if is_card(device) else nullcontext()


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the host on the device; a card takes it from pinned memory, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if is_card(device) else tensor


def sent_together(tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Tensors of the host on the device, on a card as views of one buffer: one copy for all of them."""
    if not is_card(device):
        return dict(tensors)
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name], size = size, size + -(-tensor.nbytes // ALIGNED) * ALIGNED
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, tensor in tensors.items():
        _at(buffer, places[name], tensor).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    return {name: _at(there, places[name], tensor) for name, tensor in tensors.items()}


ALIGNED = 16  # bytes: every type may begin at a multiple of it


def _at(buffer: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[place : place + like.nbytes].view(like.dtype).view(like.shape)

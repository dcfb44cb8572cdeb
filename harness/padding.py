"""Whether a batch has padding, told to transformers, which would otherwise look at the mask on the card in every forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dpft.harness import devices

MASK, WHOLE = "attention_mask", "holds_no_padding"
# Of transformers.masking_utils: each gets the mask [b, T] first, and says whether attention can do without one.
ASKING = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa")


def sent(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of the host on the device; a card's mask remembers what the host knows of it."""
    there = devices.sent_together(batch, device)
    if MASK in batch and devices.is_card(device):
        setattr(there[MASK], WHOLE, bool(batch[MASK].all()))
    return there


@contextmanager
def known(batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a model of transformers that gets this batch need not look; the answers are those that it would find."""
    whole, masking = getattr(batch.get(MASK), WHOLE, None), sys.modules.get("transformers.masking_utils")
    names = [name for name in ASKING if masking is not None and whole is not None and hasattr(masking, name)]
    own = {name: getattr(masking, name) for name in names}
    for name, function in own.items():
        setattr(masking, name, _answered(function, whole))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(masking, name, function)


def _answered(function: Callable[..., bool], whole: bool) -> Callable[..., bool]:
    def answer(padding_mask: torch.Tensor | None, *rest: Any, **more: Any) -> bool:
        if padding_mask is not None and not whole:
            return False  # there is padding, so there must be a mask
        return function(None, *rest, **more)

    return answer

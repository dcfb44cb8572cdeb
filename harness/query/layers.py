"""Layers whose weight is a matrix, as methods and engines tell them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # methods are listed without torch
    from torch import nn


def is_linear(module: nn.Module) -> bool:
    """A Linear layer, or GPT-2's."""
    from torch import nn

    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is [d, p], not [p, d]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")

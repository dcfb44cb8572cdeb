"""Tensors that have a shape only."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: torch.Tensor) -> bool:
    """False for a fake tensor: memory is predicted on those (harness/memory), and nothing may be asked of their values."""
    return not isinstance(tensor, FakeTensor)

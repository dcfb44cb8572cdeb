"""Tensors that have a shape only."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: torch.Tensor) -> bool:
    """False for a fake tensor and one on the meta device: memory is predicted and runs are rehearsed on those, and nothing may
    be asked of their values."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)

"""How runs are made: everything that changes where and how fast, not what is computed. Needs no torch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from dpft.harness.errors import BadInput

# Padded tokens per microbatch, by kind of device. On a CPU few tokens stay in the cache; a GPU is filled only by many.
MAX_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Settings:
    """max_tokens: padded tokens per microbatch, None: MAX_TOKENS of the device; timeout: seconds per run;
    checkpoint_seconds: between checkpoints. secure_noise: batches and noise from the operating system's entropy, which no
    file holds; such a run cannot be repeated. ranks: processes that share the run (harness/train/ranks.py), whatever was asked.
    recompute: blocks run again in the backward pass (recomputing.py). shard_model: of frozen weights each rank holds a part
    (harness/engine/parted.py).
    """

    data_dir: Path | None = None
    engine: str = "factored"
    device: str = "cpu"
    max_tokens: int | None = None
    timeout: float | None = None
    checkpoint_seconds: float = 300.0
    secure_noise: bool = False
    ranks: int = 1
    recompute: bool = False
    shard_model: bool = False


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step instead of handing it back to the kernel.

    Large tensors are otherwise mapped afresh in every step, and clearing their pages took 10-25% of a step of MiniLM-L6
    here. Without glibc nothing changes. Call it before the first tensor is made.
    """
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def exact_fp32() -> None:
    """fp32 means fp32: no TF32 in matrix products and convolutions, which would round factors and sums differently.

    The default of PyTorch allows it in convolutions. Who wants speed asks for bf16, where the bound on norms is kept.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def pick_device(name: str) -> str:
    """A torch device name; `auto` is `cuda` where there is one. Raises BadInput for a device that is not there."""
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"There is no device {name!r}; use cpu, cuda or auto.") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not available):
        raise BadInput(f"The device {name} is not available on this machine; use cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise BadInput(f"There is no device {name}: cards are counted from cuda:0, and there are {count}.")
    return name

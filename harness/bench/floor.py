"""The floor: the time that a step's matrix products alone take at the rate this machine multiplies at."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, int, int]  # tokens per example, input and output features of a Linear layer
REPEATS = 5


@dataclass(frozen=True)
class Work:
    """Counted per example. flops: of the non-private step; gram_flops: what a DP step adds; shapes: all Linear calls."""

    flops: int
    gram_flops: int
    shapes: Counter[Shape]


def norm_flops(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of one example's gradient norm of a Linear weight: two grams of [tokens, tokens], or the gradient itself.

    Full grams, none shared between layers; norms of all other layers, noise and optimizer count as free.
    """
    return min(2 * tokens**2 * (inputs + outputs), 2 * tokens * inputs * outputs)


def count(model: nn.Module, loss: Callable[[dict], torch.Tensor], batch: dict[str, torch.Tensor]) -> Work:
    """Count forward and backward of `loss(batch)` on the first example; leaves no gradients behind."""
    calls: list[tuple[Shape, bool]] = []

    def note(module, args, output):
        shape = (args[0].numel() // module.in_features, module.in_features, module.out_features)
        calls.append((shape, module.weight.requires_grad))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        # attention in plain products: the counter does not know the CPU's fused kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss({name: tensor[:1] for name, tensor in batch.items()}).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    grams = sum(norm_flops(*shape) for shape, trains in calls if trains)
    return Work(counter.get_total_flops(), grams, Counter(shape for shape, _ in calls))


def matmul_rate(shapes: Counter[Shape], batch_size: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the three products of Linear layers (output, input gradient, weight gradient), weighted by calls."""
    flops = seconds = 0.0
    for (tokens, inputs, outputs), calls in shapes.items():
        a = torch.randn(batch_size * tokens, inputs, device=device).to(dtype)
        e = torch.randn(batch_size * tokens, outputs, device=device).to(dtype)
        w = torch.randn(outputs, inputs, device=device).to(dtype)
        once = statistics.median(_seconds(a, e, w, device) for _ in range(REPEATS + 1))
        seconds += calls * once
        flops += calls * 6 * batch_size * tokens * inputs * outputs
    return flops / seconds


def _seconds(a: torch.Tensor, e: torch.Tensor, w: torch.Tensor, device: str) -> float:
    wait(device)
    start = time.perf_counter()
    _, _, _ = a @ w.T, e @ w, e.T @ a
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

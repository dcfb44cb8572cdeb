"""Keep factors or materialise? By memory, and where that allows both by a measurement made once on this device."""

from __future__ import annotations

import functools
import time

import torch

from dpft.harness.cache import cached

DECISIVE = 4.0  # beyond this ratio of flops nothing is measured
CLEARLY = 1.2  # a measurement must be this clear to go against the flops: near ties must not depend on chance
SMALL = 1 << 14  # numbers in a weight: below this the difference is not worth a measurement


def cheaper_kept(inputs: torch.Tensor, width: int) -> bool:
    """Whether per-example gradients [b, width, d] cost less than the factors A = inputs [b, T, d] and E [b, T, width].

    Materialising takes T d p operations an example against T^2 (d + p) + T d p, and d p numbers against T (d + p): one ratio
    decides both. Gradients larger than their factors are never kept: in the cache they are quick to make, but a whole
    batch of them is not in the cache.
    """
    tokens, d = inputs.shape[1:]
    ratio = d * width / (tokens * (d + width))
    if ratio >= 1 or ratio <= 1 / DECISIVE or d * width < SMALL:
        return ratio < 1
    rounded = 1 << (tokens - 1).bit_length()
    return _kept_over_factored(rounded, d, width, inputs.device, inputs.dtype) < CLEARLY


@functools.cache
def _kept_over_factored(tokens: int, d: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time of the materialised way over that of the factored way, from disk when it was measured here before."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    key = {"tokens": tokens, "d": d, "p": width, "device": where, "dtype": str(dtype), "torch": torch.__version__}
    key["threads"] = torch.get_num_threads()
    return cached(
        "step", key, lambda v: isinstance(v, float) and v > 0, lambda: _measure(tokens, d, width, device, dtype)
    )


def _measure(tokens: int, d: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    batch = 8
    inputs = torch.ones(batch, tokens, d, device=device, dtype=dtype)
    gradients = torch.ones(batch, tokens, width, device=device, dtype=dtype)
    total = torch.zeros(width, d, device=device, dtype=dtype)
    factors = torch.ones(batch, device=device, dtype=dtype)

    def kept() -> None:
        flat = (gradients.mT @ inputs).flatten(1)
        torch.linalg.vector_norm(flat, dim=1)
        total.view(-1).addmv_(flat.T, factors)

    def factored() -> None:
        ((inputs @ inputs.mT) * (gradients @ gradients.mT)).sum((1, 2))
        total.addmm_((gradients * factors[:, None, None]).flatten(0, 1).T, inputs.flatten(0, 1))

    return _seconds(kept, device) / _seconds(factored, device)


def _seconds(work, device: torch.device, repeats: int = 5) -> float:
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(repeats + 1):  # the least of the repeats: the first warms up
        wait()
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best

"""How runs of noise stream 1 drew their noise, so that `dpft run --replay` can make them again; nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LegacyStream:
    """The noise of stream 1: PyTorch's fp32 draws, block by block from four generators on a CPU, one on a GPU."""

    spread = 1.0  # standard deviation of its Gaussian draws

    def __init__(self, generator: torch.Generator):
        device = generator.device
        self._block = 1 << (15 if device.type == "cpu" else 24)
        seeds = torch.randint(2**62, (4 if device.type == "cpu" else 1,), generator=generator, device=device)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def add(self, tensors: Sequence[torch.Tensor], scale: float, divisor: float, kind: str) -> None:
        """As `KeyStream.add`."""
        blocks = [part for tensor in tensors for part in tensor.view(-1).split(self._block)]
        for i, generator in enumerate(self._generators):
            for block in blocks[i :: len(self._generators)]:
                buffer = torch.empty(block.numel(), dtype=torch.float32, device=block.device)
                if kind == "gaussian":
                    buffer.normal_(generator=generator)
                else:
                    buffer.exponential_(generator=generator)
                    buffer.sub_(torch.empty_like(buffer).exponential_(generator=generator))
                block.add_(buffer, alpha=scale).div_(divisor)

    @property
    def generator(self) -> torch.Generator:
        """Where the random scale of spherical noise comes from."""
        return self._generators[0]

    def state(self) -> torch.Tensor:
        """[streams, bytes]."""
        return torch.stack([generator.get_state() for generator in self._generators])

    def set_state(self, state: torch.Tensor) -> None:
        for generator, row in zip(self._generators, state, strict=True):
            generator.set_state(row.clone())

    def close(self) -> None:
        """Nothing to end."""

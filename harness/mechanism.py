"""The privacy boundary as a type: a clipped sum goes in, a NoisySum comes out, and only the loop may ask for it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dpft.harness.values import has_values

# Noise is drawn block by block, each block from the next of a fixed number of streams: on a CPU the streams run side by side,
# and no schedule changes what is drawn. A CPU's blocks are small enough for the cache (and for torch not to split them over
# threads again); on a GPU every block costs three launches, so there they are as large as a buffer may be.
_BLOCK = {"cpu": 1 << 15, "cuda": 1 << 24}
_STREAMS = {"cpu": 4, "cuda": 1}


@dataclass(frozen=True)
class NoisySum:
    """A release: `(sum_i clip(g_i) + noise_multiplier * clip_norm * z) / expected_batch_size`, safe to post-process at will.

    tensors: name -> tensor in the (encoded) shape of the gradient; expected_batch_size: the public B. Dividing by the
    realised batch size would not be post-processing.
    Made by `GaussianMechanism.release` alone, which only the loop and the bench call (a test reads the calls).
    """

    tensors: dict[str, torch.Tensor]
    noise_multiplier: float
    clip_norm: float
    expected_batch_size: int

    def mean(self) -> dict[str, torch.Tensor]:
        """`tensors`, in a dictionary of the caller's own."""
        return dict(self.tensors)

    @property
    def mean_noise_std(self) -> float:
        """Standard deviation of one coordinate of `mean()`: sigma * C / B."""
        return self.noise_multiplier * self.clip_norm / self.expected_batch_size


class GaussianMechanism:
    """Adds N(0, (noise_multiplier * clip_norm)^2) to every coordinate of a sum with L2 sensitivity clip_norm.

    noise_multiplier 0 releases the sum as it is (non-private runs only). Noise is drawn in fp32 from streams of this
    mechanism's own, seeded by `generator`, in the order of the names.
    """

    name = "gaussian"

    def __init__(self, noise_multiplier: float, clip_norm: float, expected_batch_size: int, generator: torch.Generator):
        self.noise_multiplier = noise_multiplier
        self.clip_norm = clip_norm
        self.expected_batch_size = expected_batch_size
        device = generator.device
        seeds = torch.randint(2**62, (_STREAMS[device.type],), generator=generator, device=device)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
        self._workers = ThreadPoolExecutor(min(len(seeds), torch.get_num_threads())) if device.type == "cpu" else None

    def release(self, clipped_sum: dict[str, torch.Tensor]) -> NoisySum:
        """The noisy sum over the expected batch size. Works in place: `clipped_sum` holds no clean values afterwards."""
        std, size = self.noise_multiplier * self.clip_norm, self.expected_batch_size
        if std > 0:
            count, block = len(self._generators), _BLOCK[self._generators[0].device.type]
            blocks = [part for tensor in clipped_sum.values() for part in tensor.view(-1).split(block)]
            work = [(generator, blocks[i::count], std, size) for i, generator in enumerate(self._generators)]
            aside = self._workers is not None and all(map(has_values, clipped_sum.values()))
            for _ in (self._workers.map if aside else map)(_add_noise, work):
                pass
        else:
            torch._foreach_div_(list(clipped_sum.values()), size)
        return NoisySum(dict(clipped_sum), self.noise_multiplier, self.clip_norm, self.expected_batch_size)

    def state(self) -> torch.Tensor:
        """Where the streams are, for a checkpoint: [streams, bytes]."""
        return torch.stack([generator.get_state() for generator in self._generators])

    def set_state(self, state: torch.Tensor) -> None:
        for generator, row in zip(self._generators, state, strict=True):
            generator.set_state(row.clone())

    def close(self) -> None:
        """End the threads."""
        if self._workers is not None:
            self._workers.shutdown()


def _add_noise(work: tuple[torch.Generator, list[torch.Tensor], float, int]) -> None:
    generator, blocks, std, size = work
    buffer = torch.empty(max(map(torch.numel, blocks), default=0), dtype=torch.float32, device=generator.device)
    for block in blocks:
        block.add_(buffer[: block.numel()].normal_(generator=generator), alpha=std).div_(size)


def stream(device: str | torch.device, *key: object) -> torch.Generator:
    """A generator seeded by SHA-256 of `key`: streams of different keys are independent, on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

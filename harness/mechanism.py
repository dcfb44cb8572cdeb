"""The privacy boundary as a type: a clipped sum goes in, a NoisySum comes out, and only the loop may ask for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

_BLOCK = 1 << 20  # noise is drawn block by block: no second buffer of the size of the model


@dataclass(frozen=True)
class NoisySum:
    """A released sum: `sum_i clip(g_i) + noise_multiplier * clip_norm * z`, safe to post-process at will.

    tensors: name -> tensor in the (encoded) shape of the gradient; expected_batch_size: the public B.
    Made by `GaussianMechanism.release` alone, which the loop alone calls (a test reads the imports).
    """

    tensors: dict[str, torch.Tensor]
    noise_multiplier: float
    clip_norm: float
    expected_batch_size: int

    def mean(self) -> dict[str, torch.Tensor]:
        """The sum over the *expected* batch size; dividing by the realised one would not be post-processing."""
        return {name: tensor / self.expected_batch_size for name, tensor in self.tensors.items()}

    @property
    def mean_noise_std(self) -> float:
        """Standard deviation of one coordinate of `mean()`: sigma * C / B."""
        return self.noise_multiplier * self.clip_norm / self.expected_batch_size


class GaussianMechanism:
    """Adds N(0, (noise_multiplier * clip_norm)^2) to every coordinate of a sum with L2 sensitivity clip_norm.

    noise_multiplier 0 releases the sum as it is (non-private runs only). Noise is drawn in fp32 from this
    mechanism's own generator, in the order of the names.
    """

    name = "gaussian"

    def __init__(self, noise_multiplier: float, clip_norm: float, expected_batch_size: int, generator: torch.Generator):
        self.noise_multiplier = noise_multiplier
        self.clip_norm = clip_norm
        self.expected_batch_size = expected_batch_size
        self.generator = generator

    def release(self, clipped_sum: dict[str, torch.Tensor]) -> NoisySum:
        """The noisy sum. Works in place: `clipped_sum` holds no clean values afterwards."""
        std = self.noise_multiplier * self.clip_norm
        if std > 0:
            for tensor in clipped_sum.values():
                self._add_noise(tensor.view(-1), std)
        return NoisySum(dict(clipped_sum), self.noise_multiplier, self.clip_norm, self.expected_batch_size)

    def _add_noise(self, flat: torch.Tensor, std: float) -> None:
        buffer = torch.empty(min(_BLOCK, flat.numel()), dtype=torch.float32, device=flat.device)
        for start in range(0, flat.numel(), _BLOCK):
            part = flat[start : start + _BLOCK]
            part.add_(buffer[: part.numel()].normal_(generator=self.generator), alpha=std)


def stream(device: str | torch.device, *key: object) -> torch.Generator:
    """A generator seeded by SHA-256 of `key`: streams of different keys are independent, on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

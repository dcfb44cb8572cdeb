"""The privacy boundary as a type: a clipped sum goes in, a NoisySum comes out, and only the loop may ask for it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dpft.harness.privacy.calibration import Noise
from dpft.harness.privacy.mechanisms import law_of
from dpft.harness.privacy.scale_law import Term
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
    Made by `Mechanism.release` alone, which only the loop and the bench call (a test reads the calls).
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


class Mechanism:
    """Adds noise with standard deviation noise_multiplier * clip_norm to every coordinate of a sum with L2 sensitivity clip_norm.

    What noise, `noise` says (harness/privacy/mechanisms.py); None releases the sum as it is (non-private runs only). It is
    drawn in fp32 from streams of this mechanism's own, seeded by `generator`, in the order of the names.
    """

    def __init__(self, noise: Noise | None, clip_norm: float, expected_batch_size: int, generator: torch.Generator):
        self.noise = noise
        self.noise_multiplier = 0.0 if noise is None else noise.noise_multiplier
        self.clip_norm = clip_norm
        self.expected_batch_size = expected_batch_size
        device = generator.device
        seeds = torch.randint(2**62, (_STREAMS[device.type],), generator=generator, device=device)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
        self._workers = ThreadPoolExecutor(min(len(seeds), torch.get_num_threads())) if device.type == "cpu" else None

    def release(self, clipped_sum: dict[str, torch.Tensor]) -> NoisySum:
        """The noisy sum over the expected batch size. Works in place: `clipped_sum` holds no clean values afterwards."""
        size = self.expected_batch_size
        if not all(map(has_values, clipped_sum.values())):
            pass  # fakes have nothing that noise could be added to, and blocks of a fixed size take no room that grows
        elif self.noise is not None:
            self._check(clipped_sum)
            scale, draw = self._scale() * self.clip_norm, self._draw
            count, block = len(self._generators), _BLOCK[self._generators[0].device.type]
            blocks = [part for tensor in clipped_sum.values() for part in tensor.view(-1).split(block)]
            work = [(generator, blocks[i::count], scale, size, draw) for i, generator in enumerate(self._generators)]
            for _ in map(_add_noise, work) if self._workers is None else self._workers.map(_add_noise, work):
                pass
        else:
            torch._foreach_div_(list(clipped_sum.values()), size)
        return NoisySum(dict(clipped_sum), self.noise_multiplier, self.clip_norm, self.expected_batch_size)

    @property
    def _shape(self) -> str:
        return self.noise.parameters.get("shape", "gaussian")

    @property
    def _draw(self):
        return laplace if self._shape == "coordinates" else normal

    def _scale(self) -> float:
        """What this step's standard draws are multiplied by, in units of the clip norm."""
        if self._shape == "gaussian":
            return self.noise_multiplier
        if self._shape == "coordinates":
            return self.noise_multiplier / math.sqrt(2)  # the variance of Laplace(b) is 2 b^2
        noise, generator = self.noise, self._generators[0]
        law = law_of(noise.mechanism, noise.noise_multiplier, noise.parameters)
        inverse = sum(draw_term(term, generator) for term in law.terms)
        return math.sqrt(2 * _gamma((noise.parameters["dimension"] + 1) / 2, generator)) / inverse

    def _check(self, clipped_sum: dict[str, torch.Tensor]) -> None:
        """Spherical noise is certified for one dimension: with fewer coordinates than booked it would protect less."""
        booked, found = self.noise.parameters.get("dimension"), sum(t.numel() for t in clipped_sum.values())
        if booked not in (None, found):
            raise RuntimeError(f"The release has {found} coordinates, but its noise was certified for {booked}.")

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


class GaussianMechanism(Mechanism):
    """Adds N(0, (noise_multiplier * clip_norm)^2); 0 releases the sum as it is."""

    def __init__(self, noise_multiplier: float, clip_norm: float, expected_batch_size: int, generator: torch.Generator):
        noise = Noise("gaussian", noise_multiplier) if noise_multiplier > 0 else None
        super().__init__(noise, clip_norm, expected_batch_size, generator)


def _add_noise(work: tuple[torch.Generator, list[torch.Tensor], float, int, Callable]) -> None:
    generator, blocks, scale, size, draw = work
    buffer = torch.empty(max(map(torch.numel, blocks), default=0), dtype=torch.float32, device=generator.device)
    for block in blocks:
        block.add_(draw(buffer[: block.numel()], generator), alpha=scale).div_(size)


def normal(buffer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill with standard normal draws."""
    return buffer.normal_(generator=generator)


def laplace(buffer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill with Laplace draws of scale 1: the difference of two exponentials."""
    buffer.exponential_(generator=generator)
    return buffer.sub_(torch.empty_like(buffer).exponential_(generator=generator))


def draw_term(term: Term, generator: torch.Generator) -> float:
    """One draw of a term of a scale law; its numbers mean what harness/privacy/scale_law.py says (a rate is a rate)."""
    first, last = term.values[0], term.values[-1]
    if term.kind == "constant":
        return term.weight * first
    if term.kind == "gamma":
        return term.weight * last * _gamma(first, generator)
    one = torch.empty((), dtype=torch.float64, device=generator.device)
    if term.kind == "exponential":
        return term.weight * float(one.exponential_(lambd=first, generator=generator))
    return term.weight * (first + (last - first) * float(one.uniform_(generator=generator)))


def _gamma(shape: float, generator: torch.Generator) -> float:
    """One Gamma(shape) draw of scale 1."""
    one = torch.full((), shape, dtype=torch.float64, device=generator.device)
    return float(torch._standard_gamma(one, generator=generator))


def secret_stream(device: str | torch.device) -> torch.Generator:
    """A generator seeded with 63 bits of the operating system's entropy, which are kept nowhere else."""
    return torch.Generator(device=device).manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)


def stream(device: str | torch.device, *key: object) -> torch.Generator:
    """A generator seeded by SHA-256 of `key`: streams of different keys are independent, on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

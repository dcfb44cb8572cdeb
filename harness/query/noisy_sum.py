"""The privacy boundary as a type: what a method gets to see of its examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VALUES = "values"  # the name of the one tensor that answers `Values`


@dataclass(frozen=True)
class NoisySum:
    """A release: `(sum_i clip(row_i) + noise_multiplier * clip_norm * z) / expected_batch_size`, safe to post-process at will.

    Made by `Mechanism.release` alone, for `harness/train/answer.py` (a test reads the calls).

    Attributes:
        tensors: name -> tensor in the (encoded) shape of the gradient; `values` [size] of a question for numbers.
        noise_multiplier: standard deviation of the noise of one coordinate of the sum, in units of `clip_norm`; where noise is
            correlated over steps it is larger than what is accounted for.
        clip_norm: the bound that this release had.
        expected_batch_size: the public B. Dividing by the realised batch size would not be post-processing.
        beside: [size], the numbers that shared the gradient's ball; None where none were asked for.
    """

    tensors: dict[str, torch.Tensor]
    noise_multiplier: float
    clip_norm: float
    expected_batch_size: int
    beside: torch.Tensor | None = None

    def mean(self) -> dict[str, torch.Tensor]:
        """`tensors`, in a dictionary of the caller's own."""
        return dict(self.tensors)

    @property
    def values(self) -> torch.Tensor:
        """[size], the answer to a question for numbers."""
        return self.tensors[VALUES]

    @property
    def mean_noise_std(self) -> float:
        """Standard deviation of one coordinate of `mean()`: sigma * C / B."""
        return self.noise_multiplier * self.clip_norm / self.expected_batch_size

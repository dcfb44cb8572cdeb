"""What is kept of one parameter's per-example gradients until the norms are known: factors, or the gradients themselves."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from dpft.harness.errors import CannotRun

ROUNDING = 0.1  # of (sum_t |a_t||e_t|)^2 times the unit roundoff: three times the largest error seen, see `_charged`


class Grams:
    """Grams X X^T of factors [b, T, d] that several pieces share (the input of q, k and v; the gradient of a sum).

    The last few are kept, each with its factor: a key is an address, and only a live tensor keeps its address.
    """

    def __init__(self, size: int = 4):
        self._kept: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._size = size

    def of(self, factor: torch.Tensor) -> torch.Tensor:
        """[b, T, T]."""
        key = (factor.data_ptr(), factor.shape, factor.stride())
        if key not in self._kept:
            self._kept[key] = (factor, factor @ factor.mT)
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return self._kept[key][1]


@dataclass
class LinearPiece:
    """Gradient `E_b^T A_b` of a weight [p, d] as its factors: A [b, T, d], E [b, T, p]."""

    inputs: torch.Tensor
    gradients: torch.Tensor

    def squared_norms(self, grams: Grams) -> torch.Tensor:
        """||E_b^T A_b||^2 by the T x T grams of the factors: T^2 (d + p) instead of T d p (2110.05679)."""
        first, second = grams.of(self.inputs), grams.of(self.gradients)
        sizes = (first.diagonal(dim1=1, dim2=2) * second.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
        return _charged((first * second).sum((1, 2)), sizes)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        """total [p, d, ...] += sum_b factors_b E_b^T A_b; the factors go into the thinner side."""
        inputs, gradients = self.inputs, self.gradients
        if inputs.shape[2] < gradients.shape[2]:
            inputs = inputs * factors[:, None, None]
        else:
            gradients = gradients * factors[:, None, None]
        total.view(total.shape[0], -1).addmm_(gradients.flatten(0, 1).T, inputs.flatten(0, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


@dataclass
class EmbeddingPiece:
    """Gradient of an embedding table [vocabulary, d]: row v gets the sum of E over the tokens equal to v."""

    tokens: torch.Tensor
    gradients: torch.Tensor

    def squared_norms(self, grams: Grams) -> torch.Tensor:
        """Sum of <E_t, E_s> over the pairs of equal tokens; the one-hot [b, T, vocabulary] is never formed."""
        same = self.tokens[:, :, None] == self.tokens[:, None, :]
        gram = grams.of(self.gradients)
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
        sizes = (same * (lengths[:, :, None] * lengths[:, None, :])).sum((1, 2)).sqrt()
        return _charged((gram * same).sum((1, 2)), sizes)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        weighted = self.gradients * factors[:, None, None]
        total.index_add_(0, self.tokens.flatten(), weighted.flatten(0, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


@dataclass
class KeptPiece:
    """Materialised per-example gradients [b, ...] of a small parameter."""

    gradients: torch.Tensor

    def squared_norms(self, grams: Grams) -> torch.Tensor:
        return torch.linalg.vector_norm(self.gradients.reshape(len(self.gradients), -1), dim=1).square()

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        flat = self.gradients.reshape(len(self.gradients), -1)
        total.view(-1).addmv_(flat.T, factors)

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


Piece = LinearPiece | EmbeddingPiece | KeptPiece


def tied_cross_term(name: str, first: Piece, second: Piece) -> torch.Tensor:
    """<G_embedding, G_linear> per example for a table that is also an output layer; added twice to the squared norm."""
    if isinstance(second, EmbeddingPiece):
        first, second = second, first
    if not isinstance(first, EmbeddingPiece) or isinstance(second, EmbeddingPiece):
        raise CannotRun(
            f"The parameter {name} is shared by layers of kinds that have no joint rule; use --engine reference."
        )
    if isinstance(second, KeptPiece):
        rows = second.gradients.gather(1, first.tokens[:, :, None].expand(-1, -1, second.gradients.shape[2]))
        return (rows * first.gradients).sum((1, 2))
    index = first.tokens[:, None, :].expand(-1, second.gradients.shape[1], -1)
    return (second.gradients.gather(2, index) * (second.inputs @ first.gradients.mT)).sum((1, 2))


def _charged(squares: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Squared norms [b] from grams, raised by the rounding error they may have; sizes [b]: sum_t |a_t||e_t|.

    Where the terms of a gradient cancel, `sizes^2` is far above its squared norm and a gram's rounding error, at most about
    0.03 roundoffs of sizes^2 on random factors, could make the norm too small and the clipped gradient too large.
    So the error is charged: such an example is clipped a little more, an ordinary one by less than 1e-6.
    """
    return squares.clamp_min(0) + ROUNDING * torch.finfo(squares.dtype).eps * sizes.square()

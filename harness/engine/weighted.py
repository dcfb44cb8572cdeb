"""Entrywise weights on one parameter's per-example gradients: what no longer factors is made for a few examples at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dpft.harness.engine.pieces import EmbeddingPiece, Grams, KeptPiece, LinearPiece, Piece, RecomputedPiece

AT_ONCE = (
    1 << 20
)  # entries of gradients that exist at once (4 MiB of fp32: more leave the cache), but one example at least


@dataclass
class WeightedPiece:
    """`W * (sum of the pieces)`: W in the (encoded) shape of the parameter, the pieces without it.

    Once for the norms and once for the sum, each example's gradient is made and let go: T d p operations an example in place of
    a gram's T^2 (d + p), and the numbers that are clipped are those that are measured.
    """

    pieces: list[Piece]
    weights: torch.Tensor

    def made(self, examples: slice) -> torch.Tensor:
        """[k, *shape], some examples' weighted gradients."""
        total = None
        for piece in self.pieces:
            found = _made(piece, examples, self.weights.shape)
            total = found if total is None else total + found
        return total.mul_(self.weights)  # nobody else's: a product, or a sum

    def squared_norms(self, grams: Grams) -> tuple[torch.Tensor, None]:
        return torch.cat([self.made(e).flatten(1).square().sum(1) for e in self._slices()]), None

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        for examples in self._slices():
            total.view(-1).addmv_(self.made(examples).flatten(1).T, factors[examples])

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def _slices(self) -> Iterator[slice]:
        first = self.pieces[0]
        size = first.slices[-1].stop if isinstance(first, RecomputedPiece) else len(first.gradients)
        step = max(1, AT_ONCE // max(1, self.weights.numel()))
        return (slice(start, min(start + step, size)) for start in range(0, size, step))


def weighted(pieces: list[Piece], weights: torch.Tensor) -> list[Piece | WeightedPiece]:
    """The pieces of a gradient whose entries are multiplied by `weights`.

    A table's rows are multiplied where they are looked up, and what is kept is multiplied as it is: both stay what they were.
    """
    if len(pieces) == 1 and isinstance(pieces[0], EmbeddingPiece):
        tokens, gradients = pieces[0].tokens, pieces[0].gradients
        return [EmbeddingPiece(tokens, gradients * weights.to(gradients.dtype)[tokens])]
    weights = weights.to(pieces[0].dtype)
    if len(pieces) == 1 and isinstance(pieces[0], KeptPiece):
        gradients = pieces[0].gradients
        return [KeptPiece(gradients * weights.reshape(gradients.shape[1:]))]
    return [WeightedPiece(pieces, weights)]


def _made(piece: Piece, examples: slice, shape: torch.Size) -> torch.Tensor:
    """[k, *shape], some examples' gradients of one piece."""
    if isinstance(piece, RecomputedPiece):
        piece, examples = LinearPiece(*piece.factors(examples)), slice(None)
    gradients = piece.gradients[examples]
    if isinstance(piece, LinearPiece):
        gradients = gradients.mT @ piece.inputs[examples]
    elif isinstance(piece, EmbeddingPiece):
        index = piece.tokens[examples][:, :, None].expand(-1, -1, shape[1])
        gradients = gradients.new_zeros(len(gradients), *shape).scatter_add_(1, index, gradients)
    return gradients.reshape(len(gradients), *shape)

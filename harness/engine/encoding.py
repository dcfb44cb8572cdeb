"""Encodings: linear, data-independent maps of one example's gradient, applied before it is clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Encoding:
    """Two-sided map `G -> L^T G R` of a weight's per-example gradient G, shape [m, n].

    left: dense [m, r], or a long vector of the rows to keep, or None (identity); right: the same for columns, [n, r].
    For a Linear weight m is the output and n the input dimension, and the map acts on the factors of
    `G = E^T A`: `(E L)^T (A R)`, so G itself is never formed. One-dimensional parameters take `left` only; weights of
    convolutions [m, ...] are seen as [m, n] with all further dimensions in n, and their encoded gradient stays so.
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The encoded shape of a parameter of `shape`."""
        if self.left is None and self.right is None:
            return tuple(shape)
        if len(shape) > 2:
            shape = (shape[0], shape[1:].numel())
        sides = (self.left, self.right)[: len(shape)]
        return tuple(n if side is None else side.shape[-1] for n, side in zip(shape, sides, strict=True))

    def rows(self, factor: torch.Tensor) -> torch.Tensor:
        """`left` applied to a factor whose last dimension is m."""
        return _side(self.left, factor)

    def columns(self, factor: torch.Tensor) -> torch.Tensor:
        """`right` applied to a factor whose last dimension is n."""
        return _side(self.right, factor)

    def dense(self, per_example: torch.Tensor) -> torch.Tensor:
        """Applied to materialised gradients, shape [batch, m] or [batch, m, n, ...]."""
        if self.left is None and self.right is None:
            return per_example
        if per_example.dim() == 2:
            return self.rows(per_example)
        return self.columns(self.rows(per_example.flatten(2).mT).mT)


def _side(side: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor:
    if side is None:
        return factor
    if side.dim() == 1:
        return factor.index_select(-1, side)
    return factor @ side.to(factor.dtype)


IDENTITY = Encoding()

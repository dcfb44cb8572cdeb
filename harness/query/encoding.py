"""Encodings: data-independent maps of one example's gradient, applied before it is clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Complement:
    """A side that leaves out the span of `basis` [m, r], whose columns are orthonormal or zero: `x - (x Q) Q^T`.

    Its own transpose; [m, m] is never formed.
    """

    basis: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.basis), len(self.basis))

    def dim(self) -> int:
        return 2

    def of(self, factor: torch.Tensor) -> torch.Tensor:
        """Of a factor whose last dimension is m."""
        basis = self.basis.to(factor.dtype)
        return factor - (factor @ basis) @ basis.mT


@dataclass(frozen=True)
class Encoding:
    """Two-sided map `G -> L^T G R` of a weight's per-example gradient G, shape [m, n].

    left: dense [m, r], or a long vector of the rows to keep, or a Complement, or None (identity); right: the same for columns.
    For a Linear weight m is the output and n the input dimension, and the map acts on the factors of
    `G = E^T A`: `(E L)^T (A R)`, so G itself is never formed. One-dimensional parameters take `left` only; weights of
    convolutions [m, ...] are seen as [m, n] with all further dimensions in n, and their encoded gradient stays so.
    scale: what is kept by a vector is multiplied by it. absolute: after that every entry is replaced by its magnitude, which
    changes no norm. A side of no rows at all leaves nothing: the parameter is not asked for.
    weights: in the encoded shape; every entry is multiplied by its own, after the sides and before the magnitude. It does
    not factor: the engine makes such a weight's gradient for a few examples at a time (harness/engine/weighted.py).
    """

    left: torch.Tensor | Complement | None = None
    right: torch.Tensor | Complement | None = None
    scale: float = 1.0
    absolute: bool = False
    weights: torch.Tensor | None = None

    def finished(self, mapped: torch.Tensor) -> torch.Tensor:
        """What `rows`, `columns` and `dense` leave to do, on whole gradients of examples: `weights` and `absolute`."""
        weighted = self._weighted(mapped)
        return weighted.abs() if self.absolute else weighted

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The encoded shape of a parameter of `shape`."""
        if self.left is None and self.right is None:
            return tuple(shape)
        if len(shape) > 2:
            shape = (shape[0], shape[1:].numel())
        sides = (self.left, self.right)[: len(shape)]
        return tuple(n if side is None else side.shape[-1] for n, side in zip(shape, sides, strict=True))

    def reach(self, shape: torch.Size) -> int:
        """How many entries of a parameter of `shape` an update in this encoding can move."""
        if self.left is None and self.right is None:
            return math.prod(shape)
        if len(shape) > 2:
            shape = (shape[0], math.prod(shape[1:]))
        return math.prod(_reached(side, n) for n, side in zip(shape, (self.left, self.right), strict=False))

    def rows(self, factor: torch.Tensor) -> torch.Tensor:
        """`left` applied to a factor whose last dimension is m."""
        return self._side(self.left, factor)

    def columns(self, factor: torch.Tensor) -> torch.Tensor:
        """`right` applied to a factor whose last dimension is n."""
        return self._side(self.right, factor)

    def dense(self, per_example: torch.Tensor) -> torch.Tensor:
        """The sides applied to materialised gradients, shape [batch, m] or [batch, m, n, ...]."""
        if self.left is None and self.right is None:
            return per_example
        if per_example.dim() == 2:
            return self.rows(per_example)
        return self.columns(self.rows(per_example.flatten(2).mT).mT)

    def lift(self, encoded: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The transpose of the map: what is encoded, back in `shape`, `L (W * X) R^T`. With vectors: put back among zeros."""
        size, encoded = shape[1:].numel(), self._weighted(encoded)
        lifted = encoded if len(shape) == 1 else self._back(self.right, encoded, 1, size)
        return self._back(self.left, lifted, 0, shape[0]).reshape(shape)

    def _weighted(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded if self.weights is None else encoded * self.weights.to(encoded.dtype)

    def _side(self, side: torch.Tensor | Complement | None, factor: torch.Tensor) -> torch.Tensor:
        if side is None:
            return factor
        if isinstance(side, Complement):
            return side.of(factor)
        if side.dim() == 2:
            return factor @ side.to(factor.dtype)
        kept = factor.index_select(-1, side)
        return kept if self.scale == 1 else kept * self.scale

    def _back(self, side: torch.Tensor | Complement | None, encoded: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        if side is None:
            return encoded
        if isinstance(side, Complement):
            return side.of(encoded.movedim(dim, -1)).movedim(-1, dim)
        if side.dim() == 2:
            side = side.to(encoded.dtype)
            return side @ encoded if dim == 0 else encoded @ side.mT
        shape = (*encoded.shape[:dim], size, *encoded.shape[dim + 1 :])
        return encoded.new_zeros(shape).index_copy_(dim, side, encoded if self.scale == 1 else encoded * self.scale)


@dataclass(frozen=True)
class Stacked(Encoding):
    """Several maps of one parameter in one ball: what each of `parts` makes of the gradient, flat, one after the other."""

    parts: tuple[Encoding, ...] = ()

    def __post_init__(self) -> None:
        if any(one.weights is not None or one.absolute for one in (self, *self.parts)):
            raise ValueError("A stack of encodings has sides alone; leave out weights and absolute.")

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """The encoded shapes of the parts."""
        return [part.shape(shape) for part in self.parts]

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        return (sum(math.prod(own) for own in self.shapes(shape)),)

    def split(self, encoded: torch.Tensor, shape: torch.Size) -> list[torch.Tensor]:
        """Views of what is encoded of a parameter of `shape`, each in the encoded shape of its part."""
        shapes = self.shapes(shape)
        pieces = encoded.split([math.prod(own) for own in shapes])
        return [piece.view(own) for piece, own in zip(pieces, shapes, strict=True)]

    def reach(self, shape: torch.Size) -> int:
        """At most: parts may move the same entries."""
        return min(math.prod(shape), sum(part.reach(shape) for part in self.parts))

    def rows(self, factor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("A stack of encodings has no one map of a factor; encode by its parts.")

    columns = rows

    def dense(self, per_example: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.dense(per_example).flatten(1) for part in self.parts], 1)

    def lift(self, encoded: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return sum(part.lift(own, shape) for part, own in zip(self.parts, self.split(encoded, shape), strict=True))


def _reached(side: torch.Tensor | Complement | None, size: int) -> int:
    """Of a side of `size`: those that a vector keeps, all that a dense map spreads over, none where nothing is asked for."""
    if side is None or (side.dim() == 2 and side.shape[1]):
        return size
    return side.shape[-1]


IDENTITY = Encoding()

"""What is kept of one parameter's per-example gradients until the norms are known: factors, or the gradients themselves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dpft.harness import devices
from dpft.harness.engine.fakes import has_values
from dpft.harness.errors import CannotRun

# In units of the roundoff: what a gram's squared norm is raised by, times (sum_t |a_t||e_t|)^2 (the largest error seen on
# random factors is 0.034), and what the norm is raised by, times sum_t |a_t||e_t|, for the rounding of the sum itself.
GRAM_ROUNDING, SUM_ROUNDING = 0.1, 0.5
CANCELS = 1e5  # above this ratio of (sum_t |a_t||e_t|)^2 to the squared norm a gram keeps too few digits: taken exactly


HALVES = (
    128  # from this many tokens on a gram is made of blocks: it is symmetric, so a quarter of it need not be computed
)


class Gram:
    """X X^T of a factor X [b, T, d], [b, T, T], as blocks: all of it, or upper left, upper right and lower right."""

    def __init__(self, factor: torch.Tensor):
        tokens = factor.shape[1]
        self.half = tokens // 2 if tokens >= HALVES else tokens
        first, second = factor[:, : self.half], factor[:, self.half :]
        pairs = [(first, first)] if self.half == tokens else [(first, first), (first, second), (second, second)]
        self.blocks = [x @ y.mT for x, y in pairs]
        diagonals = [g.diagonal(dim1=1, dim2=2) for g in self.blocks[::2]]
        self.lengths = (diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals, 1)).sqrt()

    def inner(self, other: list[torch.Tensor]) -> torch.Tensor:
        """Sum of the products with another symmetric matrix, given as blocks like these, [b]."""
        products = [(x * y).sum((1, 2)) for x, y in zip(self.blocks, other, strict=True)]
        return products[0] if len(products) == 1 else products[0] + 2 * products[1] + products[2]

    def like(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """A symmetric matrix [b, T, T] as blocks like these."""
        h = self.half
        if h == matrix.shape[1]:
            return [matrix]
        return [matrix[:, :h, :h], matrix[:, :h, h:], matrix[:, h:, h:]]


class Grams:
    """Grams that several pieces share (the input of q, k and v; the gradient of a sum).

    The last few are kept, each with its factor: a key is an address, and only a live tensor keeps its address.
    """

    def __init__(self, size: int = 4):
        self._kept: OrderedDict[tuple, tuple[torch.Tensor, Gram]] = OrderedDict()
        self._size = size

    def of(self, factor: torch.Tensor) -> Gram:
        key = (factor.untyped_storage()._cdata, factor.storage_offset(), factor.shape, factor.stride())
        if key not in self._kept:
            self._kept[key] = (factor, Gram(factor))
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return self._kept[key][1]


@dataclass
class LinearPiece:
    """Gradient `E_b^T A_b` of a weight [p, d] as its factors: A [b, T, d], E [b, T, p]."""

    inputs: torch.Tensor
    gradients: torch.Tensor

    def squared_norms(self, grams: Grams) -> tuple[torch.Tensor, torch.Tensor]:
        """||E_b^T A_b||^2 by the T x T grams of the factors, T^2 (d + p) instead of T d p (2110.05679), and sum_t |a_t||e_t|."""
        first, second = grams.of(self.inputs), grams.of(self.gradients)
        return first.inner(second.blocks), (first.lengths * second.lengths).sum(1)

    def dense(self, example: int, shape: torch.Size) -> torch.Tensor:
        """One example's gradient in `shape`, float64."""
        return (self.gradients[example].double().T @ self.inputs[example].double()).view(shape)

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


class AbsolutePiece(LinearPiece):
    """The magnitudes `|E_b^T A_b|`, which have the norm of the gradient; one example at a time is materialised for their sum."""

    def dense(self, example: int, shape: torch.Size) -> torch.Tensor:
        return super().dense(example, shape).abs()

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        flat = total.view(total.shape[0], -1)
        for inputs, gradients, factor in zip(self.inputs, self.gradients, factors, strict=True):
            flat.addcmul_((gradients.T @ inputs).abs_(), factor)


@dataclass
class EmbeddingPiece:
    """Gradient of an embedding table [vocabulary, d]: row v gets the sum of E over the tokens equal to v."""

    tokens: torch.Tensor
    gradients: torch.Tensor

    def squared_norms(self, grams: Grams) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of <E_t, E_s> over the pairs of equal tokens, and the same of |e_t||e_s|, its root.

        The one-hot [b, T, vocabulary] is never formed.
        """
        same = self.tokens[:, :, None] == self.tokens[:, None, :]
        gram = grams.of(self.gradients)
        lengths = gram.lengths * self.tokens.shape[1] ** 0.5  # index_add adds in order
        return gram.inner(gram.like(same)), (lengths[:, :, None] * lengths[:, None, :] * same).sum((1, 2)).sqrt()

    def dense(self, example: int, shape: torch.Size) -> torch.Tensor:
        rows = self.gradients[example].double()
        return rows.new_zeros(shape).index_add_(0, self.tokens[example], rows)

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

    def squared_norms(self, grams: Grams) -> tuple[torch.Tensor, torch.Tensor]:
        squares = self.gradients.reshape(len(self.gradients), -1).square().sum(1)  # pairwise; vector_norm adds in order
        return squares, squares.sqrt()

    def dense(self, example: int, shape: torch.Size) -> torch.Tensor:
        return self.gradients[example].double().view(shape)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        flat = self.gradients.reshape(len(self.gradients), -1)
        total.view(-1).addmv_(flat.T, factors)

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


@dataclass
class RecomputedPiece:
    """A LinearPiece whose factors are made for some examples at a time, each time they are needed, and let go."""

    factors: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
    slices: list[slice]
    dtype: torch.dtype

    def parts(self) -> Iterator[tuple[slice, LinearPiece]]:
        for examples in self.slices:
            yield examples, LinearPiece(*self.factors(examples))

    def squared_norms(self, grams: Grams) -> tuple[torch.Tensor, torch.Tensor]:
        found = [part.squared_norms(Grams()) for _, part in self.parts()]  # shared with no other piece
        squares, sizes = (torch.cat(values) for values in zip(*found, strict=True))
        return squares, sizes

    def dense(self, example: int, shape: torch.Size) -> torch.Tensor:
        return LinearPiece(*self.factors(slice(example, example + 1))).dense(0, shape)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        for examples, part in self.parts():
            part.add_weighted(total, factors[examples])


Piece = LinearPiece | EmbeddingPiece | KeptPiece | RecomputedPiece


def absolute(name: str, pieces: list[Piece]) -> list[Piece]:
    """The pieces of an entrywise magnitude. Raises CannotRun where the gradient is a sum of pieces, or a table's."""
    if len(pieces) == 1 and isinstance(pieces[0], LinearPiece):
        return [AbsolutePiece(pieces[0].inputs, pieces[0].gradients)]
    if len(pieces) == 1 and isinstance(pieces[0], KeptPiece):
        return [KeptPiece(pieces[0].gradients.abs())]
    raise CannotRun(f"There is no rule for magnitudes of gradients of {name}; freeze it or use --engine reference.")


@dataclass
class Measured:
    """One parameter's squared norms [b] before rounding is charged.

    sizes: [b], sum_t |a_t||e_t|, which bounds what rounding can do; None where the gradients are materialised.
    """

    pieces: list[Piece]
    squares: torch.Tensor
    sizes: torch.Tensor | None


def measured(name: str, pieces: list[Piece], grams: Grams) -> Measured:
    """The squared norms of the sum of the pieces, as the factors give them. Raises CannotRun for kinds without a joint rule."""
    found = [piece.squared_norms(grams) for piece in pieces]
    if len(pieces) == 1:
        squares, sizes = found[0]
        return Measured(pieces, squares, None if isinstance(pieces[0], KeptPiece) else sizes)
    if len(pieces) > 2:
        raise CannotRun(f"The parameter {name} is shared by layers of three kinds; use --engine reference.")
    squares, sizes = (torch.stack(values).sum(0, dtype=torch.float64) for values in zip(*found, strict=True))
    return Measured(pieces, squares + 2 * tied_cross_term(name, *pieces).double(), sizes)


def charged(found: list[Measured], shapes: list[torch.Size]) -> torch.Tensor:
    """||sum of the pieces||^2 of several parameters, [K, b] float64, never below that of what `add_weighted` adds.

    Where the terms of a gradient cancel, sum_t |a_t||e_t| is far above its norm, and rounding could make the norm too small
    and the clipped gradient too large. So the rounding is charged; it is below 1e-6 of the norm of an ordinary example.
    shapes: of the encoded parameters. All parameters together: one look at the device, and few small operations.
    """
    squares = torch.stack([one.squares.double() for one in found])
    rows = [i for i, one in enumerate(found) if one.sizes is not None]
    if not rows:
        return squares
    place = devices.sent(torch.tensor(rows), squares.device)
    factored = squares[place].clamp_min(0)
    sizes = torch.stack([found[i].sizes.double() for i in rows])
    per_row = [(torch.finfo(found[i].pieces[0].dtype).eps, len(found[i].pieces)) for i in rows]
    roundoff, count = devices.sent(torch.tensor(per_row, dtype=torch.float64), squares.device).T[:, :, None]
    factored += GRAM_ROUNDING * count.square() * roundoff * sizes.square()
    # looking would wait for another device: there such examples are clipped more
    if squares.device.type == "cpu" and has_values(squares):
        for k, example in (factored * CANCELS < sizes.square()).nonzero().tolist():
            pieces, shape = found[rows[k]].pieces, shapes[rows[k]]
            factored[k, example] = sum(piece.dense(example, shape) for piece in pieces).square().sum()
    squares[place] = (factored.sqrt() + SUM_ROUNDING * roundoff * sizes).square()
    return squares


def tied_cross_term(name: str, first: Piece, second: Piece) -> torch.Tensor:
    """<G_embedding, G_linear> per example for a table that is also an output layer; added twice to the squared norm."""
    if isinstance(second, EmbeddingPiece):
        first, second = second, first
    if not isinstance(first, EmbeddingPiece) or isinstance(second, EmbeddingPiece):
        raise CannotRun(
            f"The parameter {name} is shared by layers of kinds that have no joint rule; use --engine reference."
        )
    if isinstance(second, RecomputedPiece):
        tables = ((EmbeddingPiece(first.tokens[e], first.gradients[e]), part) for e, part in second.parts())
        return torch.cat([tied_cross_term(name, table, part) for table, part in tables])
    if isinstance(second, KeptPiece):
        rows = second.gradients.gather(1, first.tokens[:, :, None].expand(-1, -1, second.gradients.shape[2]))
        return (rows * first.gradients).sum((1, 2))
    index = first.tokens[:, None, :].expand(-1, second.gradients.shape[1], -1)
    return (second.gradients.gather(2, index) * (second.inputs @ first.gradients.mT)).sum((1, 2))

"""The tangent space of the matrices of rank r at s B A: its coordinates, and the ways into it, out of it and between two of them.

With U and V orthonormal bases of the columns of B and of the rows of A, the projection of a gradient G on it is
`U U^T G + (I - U U^T) G V V^T`. Its coordinates are `U^T G` [r, n] and `(I - U U^T) G V` [m, r], an isometry: their length is
the projection's Frobenius norm, whatever the factors are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.encoding import Encoding

    Coordinates = tuple[torch.Tensor, torch.Tensor]  # [r, n] and [m, r]

# A direction of a factor that is shorter than this, relative to its longest one, is not asked for: dividing by its length
# would make the rounding of the gradient its signal.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Basis:
    """The columns of a factor F [size, r] by one decomposition, the polar one F = full root, in float64.

    Unlike singular vectors it has no signs to choose, so the same product has the same bases, whatever its factors are
    multiplied by. kept: the projection [r, r] on the directions above the tolerance; columns: full kept; inverse: `F inverse =
    columns`. Shapes never depend on values.
    """

    full: torch.Tensor
    root: torch.Tensor
    kept: torch.Tensor
    inverse: torch.Tensor

    @property
    def columns(self) -> torch.Tensor:
        return self.full @ self.kept


def basis(factor: torch.Tensor) -> Basis:
    left, lengths, right = _svd(factor.detach().double())
    kept = (lengths > TOLERANCE * lengths[:1]).double()
    scales = (lengths, kept, kept / lengths.clamp_min(1e-300))
    return Basis(left @ right, *(right.mT * scale @ right for scale in scales))


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    return torch.linalg.svd(matrix, full_matrices=False)


@dataclass(frozen=True)
class Tangent:
    """At s B A; left: the basis of B [m, r], right: that of A^T [n, r]."""

    left: Basis
    right: Basis
    scaling: float

    def encodings(self) -> tuple[Encoding, Encoding]:
        """Of the gradients s B^T G of A and s G A^T of B, to the two coordinates of G: s is divided out."""
        from dpft.harness.query.encoding import Complement, Encoding

        first, second = (side.inverse / self.scaling for side in (self.left, self.right))
        return Encoding(left=first), Encoding(left=Complement(self.left.columns), right=second)

    def inside(self, x: Coordinates) -> Coordinates:
        """Without what no gradient has: noise along U in the second coordinate, and in directions that are not asked for."""
        first, second = (part.double() for part in x)
        u, second = self.left.columns, second @ self.right.kept
        return self.left.kept @ first, second - u @ (u.mT @ second)

    def from_other(self, x: Coordinates, left: torch.Tensor, right: torch.Tensor) -> Coordinates:
        """The projection of a vector of the tangent space with the bases `left` and `right`, in the coordinates of this one."""
        (first, second), u, v = x, self.left.columns, self.right.columns
        rows = (u.mT @ left) @ first + (u.mT @ second) @ right.mT
        columns = left @ (first @ v) + second @ (right.mT @ v)
        return self.inside((rows, columns))

    def retracted(self, x: Coordinates, step: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (B, A) of the matrix of rank r nearest to `s B A - step x`, balanced: B^T B = A A^T.

        Both sides are spanned by 2r columns, so the decomposition is of a matrix [2r, 2r]. Of the balanced factors it takes those
        whose B is turned the least from this space's.
        """
        import torch

        (first, second), rank, eye = (
            self.inside(x),
            len(self.left.root),
            torch.eye(len(self.left.root), dtype=self.left.root.dtype, device=self.left.root.device),
        )
        here = self.scaling * self.left.root @ self.right.root
        core = torch.cat([torch.cat([here, -step * eye], 1), torch.cat([-step * self.right.kept, 0 * eye], 1)])
        q, r = torch.linalg.qr(torch.cat([self.left.full, second], 1))
        p, t = torch.linalg.qr(torch.cat([self.right.full, first.mT], 1))
        left, values, right = _svd(r @ core @ t.mT)
        root = (values[:rank] / self.scaling).sqrt()
        new_b, new_a = q @ (left[:, :rank] * root), (p @ (right[:rank].mT * root)).mT
        turn, _, back = _svd(new_b.mT @ self.left.full)
        return new_b @ (turn @ back), (turn @ back).mT @ new_a

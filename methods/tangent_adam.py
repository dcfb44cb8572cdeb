"""Adam in tangent spaces that move: neither the factors of a matrix nor the choice of bases change what it does (2606.00944)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpft.methods.decoders.moments import EPSILON

if TYPE_CHECKING:
    import torch

    from dpft.methods.tangent import Coordinates, Tangent

WIDEST = 1e4  # the largest second moment over the least that is divided by; the authors' code


class TangentAdam:
    """The first moment is a vector of the tangent space, projected from each step's space on the next one's.

    The second moments are matrices of r directions: running means of `X X^T / n` of the first coordinate and `Y^T Y / (m - r)` of
    the second, turned with the bases; the noise of one release is its variance times the identity in both. Directions are
    `V^-1/2 X` and `Y W^-1/2`, with eigenvalues no smaller than `floor` times the variance of the noise. Entrywise moments, as
    Adam has them, would mean something else in every basis.
    """

    def __init__(self, floor: float, beta: float = 0.9, beta2: float = 0.999):
        self.floor, self.beta, self.beta2 = floor, beta, beta2
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def direction(self, name: str, space: Tangent, x: Coordinates, noise_std: float, seen: int) -> Coordinates:
        """Of the release x in `space`, the `seen`-th of the matrix called `name`, noise of `noise_std` in each coordinate."""
        import torch

        left, right, rank = space.left.columns, space.right.columns, len(space.left.root)
        spread = (x[0] @ x[0].mT / x[0].shape[1], x[1].mT @ x[1] / max(len(x[1]) - rank, 1))
        first, second = tuple(map(torch.zeros_like, x)), tuple(map(torch.zeros_like, spread))
        if name in self._kept:
            kept = {key: tensor.to(left) for key, tensor in self._kept[name].items()}
            first = space.from_other((kept["first_rows"], kept["first_columns"]), kept["left"], kept["right"])
            turns = (left.mT @ kept["left"], right.mT @ kept["right"])
            matrices = (kept["second_rows"], kept["second_columns"])
            second = tuple(turn @ matrix @ turn.mT for turn, matrix in zip(turns, matrices, strict=True))
        first = tuple(self.beta * m + (1 - self.beta) * own for m, own in zip(first, x, strict=True))
        second = tuple(self.beta2 * v + (1 - self.beta2) * own for v, own in zip(second, spread, strict=True))
        keys = ("first_rows", "first_columns", "second_rows", "second_columns", "left", "right")
        self._kept[name] = {k: t.float() for k, t in zip(keys, (*first, *second, left, right), strict=True)}
        roots = [self._inverse_root(v / (1 - self.beta2**seen), noise_std) for v in second]
        rows, columns = (m / (1 - self.beta**seen) for m in first)
        return space.inside((roots[0] @ rows, columns @ roots[1]))

    def _inverse_root(self, moment: torch.Tensor, noise_std: float) -> torch.Tensor:
        import torch

        values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
        least = (values[-1:] / WIDEST).clamp_min(self.floor * noise_std**2)
        return vectors / (torch.maximum(values, least).sqrt() + EPSILON) @ vectors.mT

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{key}|{name}": tensor for name, kept in self._kept.items() for key, tensor in kept.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._kept = {}
        for entry, tensor in state.items():
            key, name = entry.split("|", 1)
            self._kept.setdefault(name, {})[key] = tensor

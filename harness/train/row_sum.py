"""Rows of numbers, one per example: clipped and summed."""

from __future__ import annotations

import math

import torch

from dpft.harness.errors import BadInput


class Rows:
    """A running sum of rows of `size` numbers, each no longer than `bound` in L2. Sums and norms are float64."""

    def __init__(self, size: int, bound: float, device: torch.device | str = "cpu"):
        if not (math.isfinite(bound) and bound > 0):
            raise BadInput(
                f"The bound of a question for numbers must be finite and positive, not {bound!r}; correct it."
            )
        self.size, self.bound, self._device = size, bound, device
        self._total: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, count: int, bounds: torch.Tensor | None = None) -> torch.Tensor:
        """Add the rows of `count` examples; returns their norms before clipping, [count]. bounds: [count], instead of `bound`.

        Raises BadInput for another shape.
        """
        check_rows(rows, count, self.size)
        rows = rows.detach().double()
        limit = torch.full((count,), self.bound, dtype=rows.dtype, device=rows.device)  # rows may be sparse
        limit = limit if bounds is None else bounds.double()
        if rows.is_sparse:
            rows = rows.coalesce()
            owner, columns = rows.indices()
            values = rows.values()
            norms = values.new_zeros(count).index_add_(0, owner, values.square()).sqrt()
            if self._total is None:
                self._total = torch.zeros(self.size, dtype=values.dtype, device=values.device)
            self._total.index_add_(0, columns, values * self._factors(norms, limit)[owner])
        else:
            norms = torch.linalg.vector_norm(rows, dim=1)
            clipped = self._factors(norms, limit) @ rows
            self._total = clipped if self._total is None else self._total.add_(clipped)
        return norms

    @staticmethod
    def _factors(norms: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        return (limit / norms.clamp_min(1e-300)).clamp_max(1.0)

    def total(self) -> torch.Tensor:
        """[size] float32; zeros where no example was there."""
        return torch.zeros(self.size, device=self._device) if self._total is None else self._total.float()


def check_rows(rows: object, count: int, size: int, question: str = "") -> None:
    """Raises BadInput unless `rows` are [count, size]. question: its name, where it is known."""
    if not isinstance(rows, torch.Tensor) or tuple(rows.shape) != (count, size):
        seen = f"shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else f"type {type(rows).__name__}"
        raise BadInput(
            f"A question{question and f' {question!r}'} for {size} numbers of {count} examples was answered in {seen}; let `of` "
            f"return [{count}, {size}]."
        )

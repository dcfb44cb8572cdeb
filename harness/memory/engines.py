"""What dpft's engine is compared with in memory: per-example gradients materialised, and ghost clipping in two passes."""

from __future__ import annotations

import torch

from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.engine.pieces import KeptPiece, LinearPiece, Measured, Piece, measured
from dpft.harness.engine.weighted import WeightedPiece
from dpft.harness.query.encoding import IDENTITY


class Materialised(FactoredEngine):
    """Every per-example gradient is made, [batch, *shape] in fp32, and held until all norms are known (1607.00133).

    What Opacus's hooks hold, also for layers that its hooks do not take. Flat clipping only.
    """

    name = "materialised"

    def _measured(self, name: str, pieces: list[Piece]) -> Measured:
        shape = self._pass.encodings.get(name, IDENTITY).shape(self.parameters[name].shape)
        kept = _dense(pieces.pop(), shape)
        while pieces:
            kept += _dense(pieces.pop(), shape)
        return measured(name, [KeptPiece(kept)], self._pass.grams)


class TwoPasses(FactoredEngine):
    """Ghost clipping: one pass for the norms, which keeps nothing else, one for the gradient of the weighted loss (2110.05679).

    Without encodings, flat clipping only.
    """

    name = "ghost"

    def accumulate(self, batch, total, bound, encodings):
        losses, norms = super().accumulate(batch, total, bound, {})
        factors = self.factors(norms, bound)[:, 0].to(losses.dtype)
        with self.clock("forward"):
            weighted = (self.losses(batch) * factors).sum()
        with self.clock("backward"):
            weighted.backward()
        for name, p in self.parameters.items():
            total[name] = total[name].add_(p.grad) if dict.__contains__(total, name) else p.grad
            p.grad = None
        return losses, norms

    def _measured(self, name: str, pieces: list[Piece]) -> Measured:
        found = super()._measured(name, pieces)
        return Measured([], found.squares, None)


def _dense(piece: Piece, shape: tuple[int, ...]) -> torch.Tensor:
    """[batch, *shape], at least fp32."""
    if isinstance(piece, WeightedPiece):
        made = piece.made(slice(None))
        return made.to(torch.promote_types(made.dtype, torch.float32))
    gradients = piece.gradients.to(torch.promote_types(piece.dtype, torch.float32))
    if isinstance(piece, KeptPiece):
        return gradients
    if isinstance(piece, LinearPiece):
        return (gradients.mT @ piece.inputs.to(gradients.dtype)).view(len(gradients), *shape)
    index = piece.tokens[:, :, None].expand(-1, -1, shape[1])
    return gradients.new_zeros(len(gradients), *shape).scatter_add_(1, index, gradients)

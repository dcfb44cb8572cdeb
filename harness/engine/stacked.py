"""Pieces of a parameter that is asked for in several encodings at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpft.harness.engine.pieces import Grams, Piece
from dpft.harness.engine.rules import Rule
from dpft.harness.engine.taps import Use
from dpft.harness.query.encoding import Encoding, Stacked


def piece_of(rule: Rule, uses: list[Use], local: str, encoding: Encoding, shape: torch.Size) -> Piece | StackedPiece:
    """What `rule` makes of the uses of a parameter of `shape`, once for each part of a stack."""
    if not isinstance(encoding, Stacked):
        return rule(uses, local, encoding)
    return StackedPiece([rule(uses, local, part) for part in encoding.parts], encoding, shape)


@dataclass
class StackedPiece:
    """Gradients that lie flat, part after part; each part is a piece of its own, and no part forms the whole gradient."""

    parts: list[Piece]
    encoding: Stacked
    shape: torch.Size  # of the parameter

    def squared_norms(self, grams: Grams) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts lie side by side, so their squared norms add up, and so do the squares of what bounds their rounding."""
        found = [part.squared_norms(grams) for part in self.parts]
        squares, sizes = (torch.stack(values) for values in zip(*found, strict=True))
        return squares.sum(0), sizes.square().sum(0).sqrt()

    def dense(self, example: int, shape: torch.Size) -> torch.Tensor:
        shapes = self.encoding.shapes(self.shape)
        own = [part.dense(example, size).flatten() for part, size in zip(self.parts, shapes, strict=True)]
        return torch.cat(own).view(shape)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        for part, own in zip(self.parts, self.encoding.split(total, self.shape), strict=True):
            part.add_weighted(own, factors)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

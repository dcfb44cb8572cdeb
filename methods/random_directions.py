"""Random directions in the space of all weights that are never whole: made piece by piece from a seed when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpft.methods import projection

if TYPE_CHECKING:
    import torch

PIECE = 1 << 18  # numbers; part of what a seed means: other pieces would be other directions


@dataclass(frozen=True)
class Directions:
    """z_1, z_2, ... ~ N(0, I) of one step; of z_k the part of parameter `number` is a function of (seed, step, k, number) alone.

    In fp32, on the parameter's device: devices of one kind draw the same.
    """

    seed: int
    step: int

    def pieces(self, k: int, number: int, p: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(where in the flattened parameter, z there), a piece after the other; the next takes the room of the one before.

        Of a parameter without values there are none, but for the room.
        """
        import torch

        from dpft.harness.engine.fakes import has_values

        room = torch.empty(min(PIECE, p.numel()), device=p.device)
        if not has_values(p):
            return
        source = projection.generator(p.device, self.seed, self.step, k, number)
        for start in range(0, p.numel(), PIECE):
            piece = room[: p.numel() - start]
            yield slice(start, start + len(piece)), piece.normal_(generator=source)

    def moved(self, k: int, number: int, p: torch.Tensor, distance: float) -> torch.Tensor:
        """`p + distance * z_k`, rounded once to the dtype of p."""
        import torch

        found = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        here, there = p.detach().reshape(-1), found.view(-1)
        for where, z in self.pieces(k, number, p):
            torch.add(here[where], z, alpha=distance, out=there[where])
        return found

    def summed(self, factors: torch.Tensor, number: int, p: torch.Tensor) -> torch.Tensor:
        """`sum_k factors[k] z_k` in the shape of p, in fp32 at least: one buffer, whatever K."""
        import torch

        found = torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        flat = found.view(-1)
        for k, factor in enumerate(factors):
            for where, z in self.pieces(k, number, p):
                flat[where].add_(z.mul_(factor))
            where = z = None  # or the next direction finds the room of this one still taken
        return found

"""Random directions in the space of all weights that are never whole: made piece by piece from a seed when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpft.methods import projection

if TYPE_CHECKING:
    import torch

PIECE = 1 << 18  # numbers at most; part of what a seed means: other pieces would be other directions


@dataclass(frozen=True)
class Directions:
    """z_1, z_2, ... ~ N(0, I) of one step; of z_k the part of parameter `number` is a function of (seed, step, k, number) alone.

    In fp32, on the parameter's device: devices of one kind draw the same. A piece holds whole rows of the parameter and has a
    generator of its own, so that any of them can be made alone.
    """

    seed: int
    step: int

    def borders(self, p: torch.Tensor) -> Iterator[slice]:
        """Where in the flattened parameter each piece lies. Of a parameter without values there is the first one alone."""
        from dpft.harness.engine.fakes import has_values

        width = max(1, p.shape[1:].numel()) if p.dim() > 1 else 1
        size = max(1, PIECE // width) * width
        for start in range(0, p.numel() if has_values(p) else 1, size):
            yield slice(start, min(start + size, p.numel()))

    def piece(self, k: int, number: int, p: torch.Tensor, where: slice) -> torch.Tensor:
        """z_k there, flat."""
        import torch

        from dpft.harness.engine.fakes import has_values

        room = torch.empty(where.stop - where.start, device=p.device)
        if not has_values(p):
            return room
        return room.normal_(generator=projection.generator(p.device, self.seed, self.step, k, number, where.start))

    def moved(self, k: int, number: int, p: torch.Tensor, distance: float) -> torch.Tensor:
        """`p + distance * z_k`, rounded once to the dtype of p."""
        import torch

        found = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        here, there = p.detach().reshape(-1), found.view(-1)
        for where in self.borders(p):
            torch.add(here[where], self.piece(k, number, p, where), alpha=distance, out=there[where])
        return found

    def looked_up(self, k: int, number: int, p: torch.Tensor, distance: float, rows: torch.Tensor) -> torch.Tensor:
        """`moved(...)[rows]` for a table p [V, d] and rows of any shape, at the cost and in the room of what is looked up."""
        import torch

        from dpft.harness.engine.fakes import has_values

        found, width = torch.nn.functional.embedding(rows, p.detach()), p.shape[1]
        flat, out = rows.reshape(-1), found.view(-1, width)
        for where in self.borders(p):
            first, last = where.start // width, where.stop // width
            if not has_values(rows):
                self.piece(k, number, p, where)  # its room
                break
            inside = (flat >= first) & (flat < last)
            if rows.device.type != "cpu":  # how many there are would have to be looked at
                z = self.piece(k, number, p, where).view(-1, width)
                there = torch.add(out, z[(flat - first).clamp(0, len(z) - 1)], alpha=distance).to(out.dtype)
                out.copy_(torch.where(inside[:, None], there, out))
                continue
            at = inside.nonzero().flatten()
            if len(at):
                z = self.piece(k, number, p, where).view(-1, width)
                out[at] = torch.add(out[at], z[flat[at] - first], alpha=distance).to(out.dtype)
        return found

    def summed(self, factors: torch.Tensor, number: int, p: torch.Tensor) -> torch.Tensor:
        """`sum_k factors[k] z_k` in the shape of p, in fp32 at least: one buffer, whatever K."""
        import torch

        found = torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        self.add(factors, number, p, found, 1.0)
        return found

    def add(self, factors: torch.Tensor, number: int, p: torch.Tensor, to: torch.Tensor, scale: float) -> None:
        """`to += scale * sum_k factors[k] z_k`, a piece after the other; p says which parameter `to` belongs to."""
        whole = to.detach()
        flat = whole.view(-1) if whole.is_contiguous() else whole.flatten()
        for where in self.borders(p):
            piece = None
            for k, factor in enumerate(factors):
                z = self.piece(k, number, p, where).mul_(factor)
                piece = z if piece is None else piece.add_(z)
            flat[where].add_(piece, alpha=scale)
        if not whole.is_contiguous():
            whole.copy_(flat.view(whole.shape))

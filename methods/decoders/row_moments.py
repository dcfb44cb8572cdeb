"""Moments of a table of which some rows move in a step: kept in the table's shape, and a row's change in its own steps only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpft.methods.decoders.moments import EPSILON

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class RowAdam:
    """Adam's direction of some rows at a time: two moments [V, d], and the number of updates [V] that each row has had.

    A row's moments are corrected by its own number of updates. Between them nothing decays: to know which rows to leave alone
    it takes their names, which are a function of releases, and never a look at which gradients are zero.
    """

    def __init__(self, beta: float = 0.9, beta2: float = 0.999):
        self._betas = (beta, beta2)
        self._kept: Tensors = {}  # made at the first update

    def precondition(self, release: torch.Tensor, rows: torch.Tensor, size: int) -> None:
        """Turn a release [r, d] of distinct `rows` [r] of a table of `size` rows into a direction, in place."""
        first, second, updates = self._tensors(release, size)
        (beta, beta2), steps = self._betas, updates[rows] + 1
        one = first[rows].lerp_(release, 1 - beta)
        two = second[rows].mul_(beta2).addcmul_(release, release, value=1 - beta2)
        for kept, new in ((updates, steps), (first, one), (second, two)):
            kept.index_copy_(0, rows, new)
        seen = steps.double()[:, None]
        root = two.div_((1 - beta2**seen).to(two.dtype)).sqrt_().add_(EPSILON)
        release.copy_(one).div_((1 - beta**seen).to(one.dtype)).div_(root)

    def _tensors(self, release: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        if not self._kept:
            shape = (size, *release.shape[1:])
            self._kept = {"rows_first": release.new_zeros(shape), "rows_second": release.new_zeros(shape)}
            self._kept["rows_updates"] = release.new_zeros(size, dtype=torch.int64)
        self._kept = {key: tensor.to(release.device) for key, tensor in self._kept.items()}  # from a checkpoint
        return self._kept["rows_first"], self._kept["rows_second"], self._kept["rows_updates"]

    def state_dict(self) -> Tensors:
        return dict(self._kept)

    def load_state_dict(self, state: Tensors) -> None:
        self._kept = {key: state[key] for key in ("rows_first", "rows_second", "rows_updates") if key in state}


class Velocity:
    """SGD's momentum, `v <- momentum v + x`, by parameter; of some rows of a table those rows alone."""

    def __init__(self, momentum: float = 0.0):
        self.momentum = momentum
        self._kept: Tensors = {}

    def add(self, name: str, release: torch.Tensor, rows: torch.Tensor | None = None, size: int = 0) -> None:
        """Turn a release into the velocity after it, in place. rows [r]: it is [r, d], of these of a table of `size` rows."""
        if not self.momentum:
            return
        shape = release.shape if rows is None else (size, *release.shape[1:])
        kept = self._kept[name] if name in self._kept else release.new_zeros(shape)
        kept = self._kept[name] = kept.to(release.device)
        if rows is None:
            release.copy_(kept.mul_(self.momentum).add_(release))
        else:
            release.add_(kept[rows], alpha=self.momentum)
            kept.index_copy_(0, rows, release)

    def state_dict(self) -> Tensors:
        return {f"velocity|{name}": tensor for name, tensor in self._kept.items()}

    def load_state_dict(self, state: Tensors) -> None:
        self._kept = {key.removeprefix("velocity|"): t for key, t in state.items() if key.startswith("velocity|")}

"""Moments of a table of which some rows move in a step: held of rows that ever moved; a row's change in its own steps only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpft.methods.decoders.moments import EPSILON

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class KeptRows:
    """Tensors of the rows of a table that were ever named, zero before: their size follows those rows, and not the table's.

    Of each row of the table one number is held, where its tensors are. Which rows are held says which were named, so names must
    be public or functions of releases.
    """

    def __init__(self) -> None:
        self._names: torch.Tensor | None = None  # [n], in the order in which they came
        self._kept: Tensors = {}  # [n or more, ...] each, in that order
        self._places: torch.Tensor | None = None  # [size] int32: of each row in `_kept`, -1 of those that are not there
        self._last: tuple[torch.Tensor, int] | None = None  # the rows that were named last, all of them held

    def at(self, rows: torch.Tensor, size: int, like: dict[str, torch.Tensor]) -> tuple[Tensors, torch.Tensor]:
        """(what is kept, to be written into; places [r] in it) of distinct `rows` [r] of a table of `size`.

        like: label -> a tensor [r, ...] of the type and shape that the rows have under it.
        """
        import torch

        if self._names is None:
            self._names, self._kept = rows[:0], {label: tensor[:0] for label, tensor in like.items()}
        if self._places is None or self._places.device != rows.device:  # the first time, or from a checkpoint
            self._names = self._names.to(rows.device)
            self._kept = {label: tensor.to(rows.device) for label, tensor in self._kept.items()}
            self._places = torch.full((size,), -1, dtype=torch.int32, device=rows.device)
            self._enter(self._names, 0)
        same = self._last is not None and self._last[0] is rows and self._last[1] == rows._version
        new = rows[:0] if same else rows[self._places[rows] < 0]  # how many there are is a look at a card
        self._last = (rows, rows._version)
        if len(new):
            self._enter(new, len(self._names))
            self._names = torch.cat([self._names, new])
            self._make_room(len(self._names))
        return self._kept, self._places[rows].long()

    def _enter(self, rows: torch.Tensor, first: int) -> None:
        import torch

        places = torch.arange(first, first + len(rows), dtype=torch.int32, device=rows.device)
        self._places.index_copy_(0, rows, places)

    def _make_room(self, count: int) -> None:
        """Room for `count` rows, and for half as many more where there was not enough: copies are rare."""
        for label, tensor in self._kept.items():
            if len(tensor) < count:
                grown = tensor.new_zeros((min(count + count // 2, len(self._places)), *tensor.shape[1:]))
                grown[: len(tensor)] = tensor
                self._kept[label] = grown

    def state_dict(self) -> Tensors:
        if self._names is None:
            return {}
        return {"names": self._names, **{label: tensor[: len(self._names)] for label, tensor in self._kept.items()}}

    def load_state_dict(self, state: Tensors) -> None:
        self._names, self._places, self._last = state.get("names"), None, None
        self._kept = {label: tensor for label, tensor in state.items() if label != "names"}


class RowAdam:
    """Adam's direction of some rows at a time: two moments [n, d], and the number of updates [n] that each row has had.

    A row's moments are corrected by its own number of updates. Between them nothing decays: to know which rows to leave alone
    it takes their names, which are a function of releases, and never a look at which gradients are zero.
    """

    def __init__(self, beta: float = 0.9, beta2: float = 0.999):
        self._betas = (beta, beta2)
        self._rows = KeptRows()

    def precondition(self, release: torch.Tensor, rows: torch.Tensor, size: int) -> None:
        """Turn a release [r, d] of distinct `rows` [r] of a table of `size` rows into a direction, in place."""
        import torch

        counts = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        kept, at = self._rows.at(rows, size, {"first": release, "second": release, "updates": counts})
        (beta, beta2), steps = self._betas, kept["updates"][at] + 1
        one = kept["first"][at].lerp_(release, 1 - beta)
        two = kept["second"][at].mul_(beta2).addcmul_(release, release, value=1 - beta2)
        for label, new in (("updates", steps), ("first", one), ("second", two)):
            kept[label].index_copy_(0, at, new)
        seen = steps.double()[:, None]
        root = two.div_((1 - beta2**seen).to(two.dtype)).sqrt_().add_(EPSILON)
        release.copy_(one).div_((1 - beta**seen).to(one.dtype)).div_(root)

    def state_dict(self) -> Tensors:
        return {f"rows|{label}": tensor for label, tensor in self._rows.state_dict().items()}

    def load_state_dict(self, state: Tensors) -> None:
        self._rows.load_state_dict(_below("rows|", state))


class Velocity:
    """SGD's momentum, `v <- momentum v + x`, by parameter; of some rows of a table those rows alone."""

    def __init__(self, momentum: float = 0.0):
        self.momentum = momentum
        self._kept: Tensors = {}
        self._rows = KeptRows()

    def add(self, name: str, release: torch.Tensor) -> None:
        """Turn a release into the velocity after it, in place."""
        if not self.momentum:
            return
        kept = self._kept[name] if name in self._kept else release.new_zeros(release.shape)
        kept = self._kept[name] = kept.to(release.device)
        release.copy_(kept.mul_(self.momentum).add_(release))

    def add_rows(self, release: torch.Tensor, rows: torch.Tensor, size: int) -> None:
        """The same of a release [r, d] of distinct `rows` [r] of a table of `size` rows."""
        if self.momentum:
            kept, at = self._rows.at(rows, size, {"velocity": release})
            release.add_(kept["velocity"][at], alpha=self.momentum)
            kept["velocity"].index_copy_(0, at, release)

    def state_dict(self) -> Tensors:
        whole = {f"velocity|{name}": tensor for name, tensor in self._kept.items()}
        return whole | {f"velocity_rows|{label}": tensor for label, tensor in self._rows.state_dict().items()}

    def load_state_dict(self, state: Tensors) -> None:
        self._kept = _below("velocity|", state)
        self._rows.load_state_dict(_below("velocity_rows|", state))


def _below(start: str, state: Tensors) -> Tensors:
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}

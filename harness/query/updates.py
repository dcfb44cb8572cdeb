"""How updates reach the parameters: all at once, or made and applied a few at a time where all of them would need room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from dpft.harness.errors import BadInput

if TYPE_CHECKING:  # methods are listed and records verified without torch
    import torch
    from torch import nn

_TOGETHER = 1 << 22  # entries of the updates that are made and applied at once (16 MiB of fp32)


class LazyUpdates(Mapping):
    """Updates that are made when they are asked for: what `make(name, part)` returns, in the parameter's shape.

    parts: what they are made of, by name; a method that trains in a subspace keeps these small and never holds a gradient of
    the model's size. add(name, part, p, scale): adds `scale` times the update to p, piece by piece.
    """

    def __init__(
        self,
        parts: dict[str, torch.Tensor],
        make: Callable[[str, torch.Tensor], torch.Tensor],
        add: Callable[[str, torch.Tensor, torch.Tensor, float], None] | None = None,
    ):
        self.parts, self._make, self.add = parts, make, add

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._make(name, self.parts[name])

    def __contains__(self, name: object) -> bool:
        return name in self.parts  # Mapping's own would make the update

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


Updates: TypeAlias = (
    "dict[str, torch.Tensor] | LazyUpdates"  # of some rows of a table: sparse (COO), in the table's shape
)


def entries(part: torch.Tensor) -> torch.Tensor:
    """What is there of a dense tensor, which is all of it, or of a sparse one that is coalesced: its rows."""
    return part.values() if part.is_sparse else part


def finite(updates: Updates) -> torch.Tensor:
    """Whether no entry is nan or infinite, []; of updates yet to be made, whether none is in what they are made of."""
    import torch

    parts = updates.parts if isinstance(updates, LazyUpdates) else updates
    sums = [entries(t).sum() for t in parts.values()]
    return torch.isfinite(torch.stack(sums)).all()  # a sum hides no nan and no inf


def apply(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], updates: Updates) -> None:
    """One step of `optimizer` on `parameters`. Its state must be kept by parameter, as that of torch's optimizers is.

    Updates that can be added piece by piece never exist as a whole under plain SGD. A sparse update costs what its rows cost,
    and moves no other; of torch's optimizers plain SGD takes one.
    """
    if isinstance(updates, LazyUpdates) and updates.add is not None and _is_plain(optimizer):
        _add(optimizer, parameters, updates)
        return
    for names in _bundles(parameters, updates.parts) if isinstance(updates, LazyUpdates) else [list(parameters)]:
        for name in names:
            if name in updates:  # others stay where they are
                parameters[name].grad = _fitted(name, updates[name], parameters[name])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _fitted(name: str, update: torch.Tensor, p: nn.Parameter) -> torch.Tensor:
    from dpft.harness.query.fitting import misfit

    if problem := misfit(update, p):
        raise BadInput(f"The update of {name} {problem}")
    return update.to(p.dtype)


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is p <- p - lr * update and nothing else."""
    import torch

    keys = ("momentum", "weight_decay", "maximize")
    return type(optimizer) is torch.optim.SGD and not any(g[key] for g in optimizer.param_groups for key in keys)


def _add(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], updates: LazyUpdates) -> None:
    import torch

    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, part in updates.parts.items():
            updates.add(name, part, parameters[name], -rates[id(parameters[name])])


def _bundles(parameters: dict[str, nn.Parameter], parts: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names whose updates are applied at once; an update has the parameter's size, or that of its rows."""
    bundle, size = [], 0
    for name, p in parameters.items():
        sparse = name in parts and parts[name].is_sparse
        own = entries(parts[name]).numel() if sparse else p.numel()
        if bundle and size + own > _TOGETHER:
            yield bundle
            bundle, size = [], 0
        bundle.append(name)
        size += own
    if bundle:
        yield bundle

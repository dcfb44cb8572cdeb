"""Where the examples are in what a layer takes and returns: found out by leaving one of a few examples out.

Most layers see [batch, ...]. Windows, chunks and routers see [batch * parts, ...], the examples one after the other; some have
the sequence first, some an argument that all examples share. What is found is a guess: the sum is compared with autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dpft.harness.engine.base import Batch

MOST = 4  # examples that are looked at
PLAIN = torch.Tensor | int | float | str | None  # what a layer may return, in any containers
Shapes = tuple[torch.Size, ...]
Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Layout:
    """The dimension that counts examples, in one or several rows of each, of every tensor of a call; None: all share the tensor.

    inputs: of the arguments. outputs: of the floating-point results. once: the first argument is [1, ...] for all.
    """

    inputs: Dims
    outputs: Dims
    once: bool = False

    @property
    def told(self) -> bool:
        """Whether it can be told what of the first argument and of the results belongs to which example."""
        return bool(self.inputs) and self.inputs[0] is not None and bool(self.outputs) and None not in self.outputs


def real_tensors(results: Any) -> list[torch.Tensor]:
    """The floating-point tensors among what a layer returns."""
    return [r for r in pytree.tree_leaves(results) if isinstance(r, torch.Tensor) and r.is_floating_point()]


@torch.no_grad()
def layouts(model: nn.Module, batch: Batch, run: Callable[[Batch], Any]) -> dict[str, list[Layout]]:
    """Path of each module that `run` calls -> the layout of each of its calls; an empty list where one has none.

    A batch of one example is looked at twice over.
    """
    more = {k: torch.cat([v, v]) if len(v) == 1 else v[:MOST] for k, v in batch.items()}
    size = len(next(iter(more.values())))
    seen: list[dict[str, list]] = []
    for part in (more, {k: v[: size - 1] for k, v in more.items()}):
        with _watched(model) as calls:
            run(part)
        seen.append(calls)
    now, fewer = seen
    found: dict[str, list[Layout]] = {}
    for path, calls in now.items():
        same = len(fewer.get(path, ())) == len(calls)
        own = [_layout(*pair, size) for pair in zip(fewer[path], calls, strict=True)] if same else [None]
        found[path] = [] if None in own else own
    return found


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, list[tuple[Shapes, Shapes] | None]]]:
    calls: dict[str, list] = {}

    def hook_of(path: str):
        def hook(module, args, kwargs, output):
            known = all(isinstance(r, PLAIN) for r in pytree.tree_leaves(output))
            given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            shapes = tuple(t.shape for t in given), tuple(t.shape for t in real_tensors(output))
            calls.setdefault(path, []).append(shapes if known else None)

        return hook

    handles = [
        m.register_forward_hook(hook_of(path), with_kwargs=True, prepend=True) for path, m in model.named_modules()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _layout(fewer: tuple[Shapes, Shapes] | None, now: tuple[Shapes, Shapes] | None, size: int) -> Layout | None:
    if fewer is None or now is None or [len(s) for s in fewer] != [len(s) for s in now]:
        return None
    found = [[_counting(*pair, size) for pair in zip(*shapes, strict=True)] for shapes in zip(fewer, now, strict=True)]
    if any(dim is _UNKNOWN for dims in found for dim in dims):
        return None
    first = now[0][0] if now[0] else ()
    return Layout(*map(tuple, found), once=len(first) > 1 and first[0] == 1 and found[0][0] is None)


_UNKNOWN = -1


def _counting(fewer: torch.Size, now: torch.Size, size: int) -> int | None:
    """The dimension that is as much smaller with one example fewer, the first before others; None where nothing is smaller."""
    if len(fewer) != len(now):
        return _UNKNOWN
    grown = [i for i, (a, b) in enumerate(zip(fewer, now, strict=True)) if a != b]
    if not grown:
        return None
    counts = [i for i in grown if fewer[i] * size == now[i] * (size - 1)]
    return counts[0] if counts and (counts[0] == 0 or len(grown) == 1) else _UNKNOWN


def to_front(tensor: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """[size, ...], row i of example i: [size, d] as it is, [size * k, d] as [size, k, d], [k, size, d] as [size, k, 1, d]."""
    if dim is None or (dim == 0 and len(tensor) == size):
        return tensor
    return tensor.unflatten(dim, (size, -1)).movedim(dim, 0)

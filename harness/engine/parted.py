"""Frozen weights of which each process holds a part: a block is gathered for its call, and let go when another one is wanted.

Not by torch's `fully_shard`. Its exchanges must be the same on all ranks and in the same order, and here ranks part ways: they
have different numbers of passes, check one example at a time and some of them twice, and one of them alone writes texts. Here a
rank asks for a block when it needs it, and who waits for others serves it meanwhile (harness/train/ranks.py). Nor is a parameter
another kind of tensor, which every rule, check and digest would have to know: between uses it is a NaN spread over its shape, so
that what is read outside of its layer's call never passes for a weight.

The backward pass needs no hooks: autograd keeps where a weight lies in its block, and what it asks for is gathered again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from dpft.harness.probes import counted_as

Gather = Callable[[int, torch.Tensor], None]  # (number of a block, uint8 [bytes] that all parts of it are written to)
ALIGNED = 64  # bytes: every weight begins at a multiple
LEAST = 0.01  # of all frozen bytes: a block with fewer stays whole on every rank
MOST = 0.25  # a block with more is looked into for blocks of its own
LISTS = (nn.ModuleList, nn.Sequential)


class Block:
    """Frozen parameters that are gathered together.

    Attributes:
        number: of the block in its model.
        parameters, kinds: as the model has them, and of which type they are.
        own, at: uint8 [bytes / processes], this process's part, and where in the block it begins.
        room: uint8 [bytes], in which the parameters lie one after another; None between uses.
        calls: that are running and need it.
    """

    def __init__(self, number: int, parameters: Sequence[nn.Parameter], place: int, count: int, device: torch.device):
        self.number, self.parameters, self.kinds = number, parameters, [p.dtype for p in parameters]
        self.room: torch.Tensor | None = None
        self.calls = 0
        size = -(-self.size(self.kinds) // (ALIGNED * count)) * ALIGNED
        whole = torch.zeros(size * count, dtype=torch.uint8)
        for p, value in zip(parameters, self.values(whole, self.kinds), strict=True):
            value.copy_(p.detach())
        self.at, self.own = place * size, whole[place * size : (place + 1) * size].clone().to(device)

    def places(self, kinds: Sequence[torch.dtype]) -> list[tuple[int, int]]:
        """(begin, end) of every parameter in bytes, where they are of these types."""
        found, begin = [], 0
        for p, kind in zip(self.parameters, kinds, strict=True):
            found.append((begin, begin + p.numel() * kind.itemsize))
            begin = -(-found[-1][1] // ALIGNED) * ALIGNED
        return found

    def size(self, kinds: Sequence[torch.dtype]) -> int:
        return self.places(kinds)[-1][1]

    def values(self, room: torch.Tensor, kinds: Sequence[torch.dtype]) -> Iterator[torch.Tensor]:
        """Views of `room` in the shapes of the parameters."""
        for p, kind, (begin, end) in zip(self.parameters, kinds, self.places(kinds), strict=True):
            yield room[begin:end].view(kind).view(p.shape)

    def held(self, index: int) -> torch.Tensor:
        """uint8 [bytes]: what of a parameter is in this process's part."""
        begin, end = (max(0, edge - self.at) for edge in self.places(self.kinds)[index])
        return self.own[begin:end]


@dataclass(frozen=True)
class _Part:
    """What a parameter knows of itself."""

    model: Parted
    block: Block
    index: int


@dataclass(frozen=True)
class _Kept:
    """In the place of a tensor that autograd keeps: a view of a block's bytes."""

    block: Block
    kind: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Parted:
    """The blocks of one model. gather: brings the parts of a block together."""

    def __init__(self, blocks: Sequence[Block], count: int, gather: Gather):
        self.blocks, self._count, self._gather = blocks, count, gather
        self._rooms: dict[int, Block] = {}  # by storage
        self._wide: torch.dtype | None = None

    @contextmanager
    def needed(self, blocks: Iterable[Block]) -> Iterator[None]:
        """Inside, the parameters of these blocks hold their values."""
        held: list[Block] = []
        try:
            for block in blocks:
                self._bring(block)
                block.calls += 1
                held.append(block)
            yield
        finally:
            for block in held:
                block.calls -= 1

    def let_go(self) -> None:
        """Free every block that no running call needs."""
        for block in self.blocks:
            if block.room is not None and not block.calls:
                del self._rooms[block.room.untyped_storage()._cdata]
                block.room = None
                self.empty(block)

    def empty(self, block: Block) -> None:
        for p, kind in zip(block.parameters, self._kinds(block), strict=True):
            p.data = torch.full((), math.nan, dtype=kind, device=block.own.device).expand(p.shape)

    @contextmanager
    def widened(self, kind: torch.dtype) -> Iterator[None]:
        """Inside, the weights are of this type. No call may be running."""
        before, self._wide = self._wide, kind
        try:
            self._emptied()
            yield
        finally:
            self._wide = before
            self._emptied()

    def _emptied(self) -> None:
        self.let_go()
        for block in self.blocks:
            self.empty(block)

    def saving(self) -> AbstractContextManager[None]:
        """Inside, autograd keeps places of weights and not the weights, which it would hold until the backward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, self._given)

    def _kinds(self, block: Block) -> list[torch.dtype]:
        return block.kinds if self._wide is None else [self._wide] * len(block.kinds)

    def _bring(self, block: Block) -> torch.Tensor:
        if block.room is None:
            self.let_go()
            with torch.inference_mode(False), torch.no_grad(), counted_as("gathered"):
                room = block.own.new_empty(len(block.own) * self._count)
                self._gather(block.number, room)
                if self._wide is not None:
                    room = self._in_wide_numbers(block, room)
                for p, value in zip(block.parameters, block.values(room, self._kinds(block)), strict=True):
                    p.data = value
            block.room = room
            self._rooms[room.untyped_storage()._cdata] = block
        return block.room

    def _in_wide_numbers(self, block: Block, narrow: torch.Tensor) -> torch.Tensor:
        wide = self._kinds(block)
        room = narrow.new_empty(block.size(wide))
        for into, value in zip(block.values(room, wide), block.values(narrow, block.kinds), strict=True):
            into.copy_(value)
        return room

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        if tensor.layout is not torch.strided:
            return tensor
        block = self._rooms.get(tensor.untyped_storage()._cdata)
        if block is None:
            return tensor
        return _Kept(block, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _given(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if not isinstance(kept, _Kept):
            return kept
        room = self._bring(kept.block).untyped_storage()
        empty = torch.empty(0, dtype=kept.kind, device=kept.block.own.device)
        return empty.set_(room, kept.offset, kept.shape, kept.stride)


def part(model: nn.Module, device: torch.device, place: int, count: int, gather: Gather) -> Parted | None:
    """Leave of the frozen weights of `model` this process's part, on `device`; None where nothing is frozen.

    place, count: which process this is, and of how many. What trains, buffers and small blocks stay whole, and where they are.
    """
    frozen = {p: None for p in model.parameters() if _can_be_parted(p)}
    total = sum(p.nbytes for p in frozen)
    parted, roots = Parted([], count, gather), set()
    for module, whole in _divided(model, MOST * total):
        own = [p for p in module.parameters(recurse=whole) if p in frozen]
        if own and sum(p.nbytes for p in own) >= LEAST * total:
            block = Block(len(parted.blocks), own, place, count, device)
            for index, p in enumerate(own):
                p.parted = _Part(parted, block, index)
                del frozen[p]
            parted.blocks.append(block)
            parted.empty(block)
            roots.add(module)
    if not parted.blocks:
        return None
    for module in model.modules():
        needed = _blocks(module.parameters(recurse=module in roots))
        if needed:
            _gather_for(module, parted, needed)
    return parted


def _can_be_parted(p: nn.Parameter) -> bool:
    plain = type(p) is nn.Parameter and p.layout is torch.strided and p.is_floating_point()
    return plain and not p.requires_grad and p.numel() > 0


def _divided(module: nn.Module, most: float, listed: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """(module, whether with what is below it): what is gathered together. The members of a list are blocks, which call what is
    in them as they like; so is what is in no list and has none inside. A member that is large and has lists is looked into."""
    lists = any(isinstance(inner, LISTS) for inner in module.modules())
    size = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    if not lists or (listed and size <= most):
        yield module, True
        return
    yield module, False
    for child in module.children():
        yield from _divided(child, most, isinstance(module, LISTS))


def _gather_for(module: nn.Module, parted: Parted, blocks: Sequence[Block]) -> None:
    """While `module` runs these blocks are there. No hooks: a layer's own code may be run without them (taps.py)."""
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def gathered(*args, **kwargs):
        with parted.needed(blocks):
            return forward(*args, **kwargs)

    gathered.of_the_type = not own
    module.forward = gathered


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has put another `forward` on this very module than its type has."""
    found = vars(module).get("forward")
    return found is not None and not getattr(found, "of_the_type", False)


def _blocks(parameters: Iterable[nn.Parameter]) -> list[Block]:
    found = {p.parted.block: None for p in parameters if hasattr(p, "parted")}
    return sorted(found, key=lambda block: block.number)


def of(model: nn.Module) -> Parted | None:
    """What `part` made of this model; None where it has not been parted."""
    return next((p.parted.model for p in model.parameters() if hasattr(p, "parted")), None)


def held(p: nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter between calls: itself, or uint8 [bytes] of a part of it, which may be none."""
    known = getattr(p, "parted", None)
    return p if known is None else known.block.held(known.index)


def whole(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, `module` may be run by pieces: all of its weights are there."""
    parted = of(module)
    return nullcontext() if parted is None else parted.needed(_blocks(module.parameters()))


def widened(model: nn.Module, kind: torch.dtype) -> AbstractContextManager[None]:
    """Inside, the parted weights of `model` are of this type."""
    parted = of(model)
    return nullcontext() if parted is None else parted.widened(kind)

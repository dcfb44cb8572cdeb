"""Live memory by category, on the CPU."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from dpft.harness.probes.clock import Clock


@contextmanager
def uncounted():
    """What is made in here is no part of the step that is measured."""
    now, before, LiveBytes.counting = LiveBytes.entered, LiveBytes.counting, False
    left = before and now is not None and _get_current_dispatch_mode() is now
    if left:  # to see every operation and count nothing is slow
        now.__exit__(None, None, None)
    try:
        yield
    finally:
        if left:
            now.__enter__()
        LiveBytes.counting = before


@contextmanager
def counted_as(category: str):
    """What is made in here is of this category, whatever the phase is."""
    before, LiveBytes.category = LiveBytes.category, category
    try:
        yield
    finally:
        LiveBytes.category = before


class LiveBytes(TorchDispatchMode):
    """Peak of live tensor bytes by category on the CPU; a function of the program alone, not of the allocator.

    Tensors that exist before are `parameters` and what `label` names; a tensor made in a phase of the clock belongs to that
    phase's category. `peak` holds the categories at the moment of the largest total.
    """

    counting = True
    entered: LiveBytes | None = None  # the innermost
    category: str | None = None  # of what is made now; None: that of the phase
    CATEGORIES = {
        "forward": "activations",
        "backward": "backward",
        "clip": "per_example",
        "noise": "noise",
        "decode": "update",
        "optimizer": "optimizer_state",
    }

    def __init__(self, clock: Clock, shapes: dict[tuple[int, ...], str] | None = None):
        """shapes: category of tensors of these shapes that are made in the backward pass or in the clip, where it is known."""
        super().__init__()
        self.clock, self._shapes = clock, shapes or {}
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = {}
        self._total = self._peak_total = 0
        self._outer: list[LiveBytes | None] = []
        self._known: dict[int, tuple[weakref.ref, list[str]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's guard against it takes a third of the time that counting does."""
        return False

    def __enter__(self) -> LiveBytes:
        self._outer.append(LiveBytes.entered)
        super().__enter__()
        LiveBytes.entered = self
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        LiveBytes.entered = self._outer.pop()

    def label(self, category: str, tensors) -> None:
        """Count the storages of `tensors` under `category` from now on, also those that were counted under another."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is None:
                self._add(tensor, category)
            else:
                size, holder = tensor.untyped_storage().nbytes(), known[1]
                self.live[holder[0]] -= size
                self.live[category] += size
                holder[0] = category

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.counting:
            return out
        category = self.category or self.CATEGORIES.get(self.clock.phase or "", "other")
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                known = self._shapes.get(tuple(tensor.shape)) if self.clock.phase in ("backward", "clip") else None
                for held in _held(tensor):
                    self._add(held, known or category)
        return out

    def _add(self, tensor: torch.Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        holder = [category]
        self._known[key] = (weakref.ref(storage, lambda _: self._remove(key, holder[0], size)), holder)
        self.live[category] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, dict(self.live)

    def _remove(self, key: int, category: str, size: int) -> None:
        del self._known[key]
        self.live[category] -= size
        self._total -= size


def _held(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that have memory: of a sparse one (COO) its indices and its values."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)

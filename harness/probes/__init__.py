"""Measurements beside the training: alignment, time by phase, live memory. Non-private, never fed back into it."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpft.harness.probes import spectra
from dpft.harness.query.noisy_sum import NoisySum

SELECTION = "selection"  # the kind of step whose release chooses rows
PHASES = ("forward", "backward", "clip", "noise", "decode", "optimizer")


class Clock:
    """Seconds by phase of one step at a time; a phase inside another stops the outer one's time.

    On CUDA the borders are events in the stream: the device is waited for once, when the seconds are taken.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.phase: str | None = None
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str | None):
        """None: in no phase."""
        outer = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    @contextmanager
    def stopped(self):
        """The phases of what is done in here are not counted; not inside a phase."""
        spans, self._spans = self._spans, []
        try:
            yield
        finally:
            self._spans = spans

    def _enter(self, phase: str | None) -> None:
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self.phase is not None:
            self._spans.append((self.phase, self._since, now))
        self.phase, self._since = phase, now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, end in self._spans:
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._spans = []
        return dict(seconds)


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float | None:
    """Cosine of two gradients concatenated over the names of `a`; None when one is zero."""
    dot = sum(float(torch.sum(a[name] * b[name], dtype=torch.float64)) for name in a)
    norms = norm(a) * norm({name: b[name] for name in a})
    return dot / norms if norms > 0 else None


def norm(a: dict[str, torch.Tensor]) -> float:
    """L2 norm over all names."""
    return sum(float(torch.sum(t.square(), dtype=torch.float64)) for t in a.values()) ** 0.5


def alignment(clean: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """Cosines of the clipped sum to `other` (the noisy sum or the decoded update), overall and per parameter.

    `overall` needs the same shapes for every parameter; a parameter of another shape has None.
    """
    comparable = {name: t for name, t in clean.items() if name in other and other[name].shape == t.shape}
    return {
        "overall": cosine(clean, other) if len(comparable) == len(clean) else None,
        "by_parameter": {name: cosine({name: t}, other) if name in comparable else None for name, t in clean.items()},
    }


def signal_to_noise(clean: dict[str, torch.Tensor], noisy: dict[str, torch.Tensor]) -> float | None:
    """Norm of the clipped sum over the norm of the noise that was added; None without noise."""
    noise = norm({name: noisy[name] - clean[name] for name in clean})
    return norm(clean) / noise if noise > 0 else None


class Look:
    """What one step's clipped sum, release and update have to do with each other: call it in the order of its methods.

    clean: the clipped sum over the expected batch size is copied, for the mechanism works in place. matrices: names of those
    whose singular values are wanted. Non-private.
    """

    def __init__(self, clipped_sum: dict[str, torch.Tensor], expected_batch_size: int, matrices: list[str]):
        with uncounted():
            self._clean = {name: t / expected_batch_size for name, t in clipped_sum.items()}
        self._matrices = matrices
        self.row: dict[str, float | None] = {}  # columns of the curve
        self.by_parameter: dict[str, dict[str, float | None]] = {}
        self.spectra: dict[str, dict[str, Any]] = {}

    def at_release(self, noisy: NoisySum) -> None:
        """Before it is decoded, which may happen in place."""
        with uncounted():
            found = alignment(self._clean, noisy.tensors)
            self.row |= {"alignment_noisy": found["overall"], "snr": signal_to_noise(self._clean, noisy.tensors)}
            self.by_parameter = {name: {"noisy": cosine} for name, cosine in found["by_parameter"].items()}
            self.spectra = spectra.of_release(self._clean, noisy, self._matrices)

    def at_update(self, update: dict[str, torch.Tensor]) -> None:
        """After decoding, before the optimizer."""
        with uncounted():
            found = alignment(self._clean, update)
            self.row["alignment_decoded"] = found["overall"]
            for name, row in self.by_parameter.items():
                row["decoded"] = found["by_parameter"][name]
            spectra.add_update(self.spectra, update)


def add_row_scores(scores: dict[str, list[float]], clean: dict[str, torch.Tensor]) -> None:
    """Add to `scores` the sums of magnitudes over the rows of what was asked for of a clean sum, by matrix. Non-private."""
    with uncounted():
        for name, tensor in clean.items():
            if tensor.dim() > 1 and tensor.numel():
                rows = tensor.flatten(1).abs().sum(1, dtype=torch.float64).tolist()
                scores[name] = [a + b for a, b in zip(scores.get(name, [0.0] * len(rows)), rows, strict=True)]


def overlap(scores: dict[str, list[float]], chosen: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many of the chosen rows clean scores would have chosen, too: by matrix, over all rows, and what chance would give."""
    found, shared, kept, by_chance = {}, 0, 0, 0.0
    for name, rows in chosen.items():
        best = sorted(range(len(scores[name])), key=lambda i, name=name: -scores[name][i])[: len(rows)]
        common = len(set(best) & set(rows.tolist()))
        found[name] = common / len(rows)
        shared, kept, by_chance = shared + common, kept + len(rows), by_chance + len(rows) ** 2 / len(scores[name])
    return {"overlap": shared / kept, "by_chance": by_chance / kept, "by_parameter": found}


@contextmanager
def uncounted():
    """What is made in here is no part of the step that is measured."""
    before, LiveBytes.counting = LiveBytes.counting, False
    try:
        yield
    finally:
        LiveBytes.counting = before


class LiveBytes(TorchDispatchMode):
    """Peak of live tensor bytes by category on the CPU; a function of the program alone, not of the allocator.

    Tensors that exist before are `parameters` and what `label` names; a tensor made in a phase of the clock belongs to that
    phase's category. `peak` holds the categories at the moment of the largest total.
    """

    counting = True
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
        self._known: dict[int, tuple[weakref.ref, list[str]]] = {}

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
        category = self.CATEGORIES.get(self.clock.phase or "", "other")
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                known = self._shapes.get(tuple(tensor.shape)) if self.clock.phase in ("backward", "clip") else None
                self._add(tensor, known or category)
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

"""Does one example's loss depend on another example of its batch? Asked of derivatives, which must be zero to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dpft.harness.engine.base import Batch, Engine, rows_each

Shapes = dict[str, list[torch.Size]]


@dataclass
class _Probe:
    """Zeros [.., batch, ..] that are added to something that belongs to the examples; dim: the examples' dimension."""

    where: str
    zeros: torch.Tensor
    dim: int

    def of(self, chosen: torch.Tensor) -> torch.Tensor | None:
        """The gradient of what belongs to those examples, each with all its rows; None where there is none."""
        found = self.zeros.grad
        if found is None:
            return None
        return found.movedim(self.dim, 0).unflatten(0, (len(chosen), -1))[chosen.to(found.device)]


def depends_on_others(engine: Engine, batch: Batch) -> str | None:
    """Where a loss has a derivative by another example's input, or None.

    The losses of some examples are summed and differentiated by the floating-point inputs of all of them and by the outputs of
    all modules that turn integers into numbers (embeddings): what belongs to the other examples must be exactly 0. Two sums:
    every other example, and the last one alone. Which dimension counts examples is found out by leaving one example out. What
    derivatives do not see (a branch, an integer, `detach`) is left to the comparison of batches of other company.
    """
    size = len(next(iter(batch.values())))
    if size < 2:
        return None
    places = torch.arange(size)
    with _frozen(engine.parameters), engine.plain():
        fewer: Shapes = {}
        with torch.no_grad(), _watched(engine.model, None, fewer, []):
            engine.losses({key: value[: size - 1] for key, value in batch.items()})
        for chosen in (places % 2 == 0, places == size - 1):
            probes: list[_Probe] = []
            with _watched(engine.model, (size, rows_each(engine.model, batch)), fewer, probes):
                losses = engine.losses(_probed(batch, probes))
            if not losses.requires_grad:
                return None
            losses[chosen.to(losses.device)].sum().backward()
            for probe in probes:
                others = probe.of(~chosen)
                if others is not None and bool(((others != 0) & ~others.isnan()).any()):
                    return probe.where
    return None


def _probed(batch: Batch, probes: list[_Probe]) -> Batch:
    probed = dict(batch)
    for key, value in batch.items():
        if value.is_floating_point():
            probes.append(_Probe(f"the input {key}", torch.zeros_like(value, requires_grad=True), 0))
            probed[key] = value + probes[-1].zeros
    return probed


@contextmanager
def _watched(model: nn.Module, size: tuple[int, int] | None, fewer: Shapes, probes: list[_Probe]) -> Iterator[None]:
    """Hooks on modules that make floating-point numbers of none: their shapes are noted in `fewer`, or (size: how many examples,
    of how many rows each) probes added."""
    calls: dict[str, int] = {}

    def hook_of(path: str):
        def hook(module, args, kwargs, output):
            given = [*args, *kwargs.values()]
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                return None
            if any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in given):
                return None
            if size is None:
                fewer.setdefault(path, []).append(output.shape)
                return None
            call = calls[path] = calls.get(path, -1) + 1
            dim = _dimension(fewer.get(path, [])[call : call + 1], output.shape, size)
            if dim is None or not torch.is_grad_enabled():
                return None
            probes.append(
                _Probe(f"the output of {path or 'the model'}", torch.zeros_like(output, requires_grad=True), dim)
            )
            return output + probes[-1].zeros

        return hook

    handles = [m.register_forward_hook(hook_of(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dimension(before: list[torch.Size], now: torch.Size, size: tuple[int, int]) -> int | None:
    """The dimension that was one example's rows smaller with one example fewer, where there is exactly one."""
    if not before or len(before[0]) != len(now):
        return None
    grown = [i for i, (a, b) in enumerate(zip(before[0], now, strict=True)) if a != b]
    examples, rows = size
    expected = ((examples - 1) * rows, examples * rows)
    return grown[0] if len(grown) == 1 and (before[0][grown[0]], now[grown[0]]) == expected else None


@contextmanager
def _frozen(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    for p in parameters.values():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters.values():
            p.requires_grad_(True)


def companies(batch: Batch) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """(other batch, rows of it that are examples of `batch`, which ones): every other example alone, and with others replaced.

    The replacements are the first and the last example, floating-point inputs ten times as large; all in reverse order.
    """
    size = len(next(iter(batch.values())))
    if size < 2:
        return
    kept = torch.arange(0, size, 2)
    yield {k: v[::2] for k, v in batch.items()}, torch.arange(len(kept)), kept
    instead = {}
    for key, value in batch.items():
        rows = value.clone()
        for place, source in ((1, 0), (3, size - 1)):
            rows[place::4] = (
                value[source : source + 1] * 10 if value.is_floating_point() else value[source : source + 1]
            )
        instead[key] = rows.flip(0)
    yield instead, size - 1 - kept, kept

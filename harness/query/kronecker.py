"""Kronecker factors of Linear layers on public examples (K-FAC, 1503.05671): what a method may know of inputs and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dpft.harness.query.layers import is_transposed
from dpft.harness.query.public import Public, evaluating

if TYPE_CHECKING:
    from dpft.harness.query.queries import Batch


@dataclass
class Factors:
    """Of one layer: sums of a a^T of its inputs and of e e^T of its output gradients over the tokens of the probes."""

    inputs: torch.Tensor | None = None
    gradients: torch.Tensor | None = None
    rows: int = 0

    def add(self, a: torch.Tensor, e: torch.Tensor) -> None:
        """Rows [n, d] and [n, p]; those without a gradient, padding for one, are left out."""
        a, e = a.detach().reshape(-1, a.shape[-1]).float(), e.reshape(-1, e.shape[-1]).float()
        alive = e.any(1)
        a, e = a[alive], e[alive]
        self.inputs = a.T @ a if self.inputs is None else self.inputs.addmm_(a.T, a)
        self.gradients = e.T @ e if self.gradients is None else self.gradients.addmm_(e.T, e)
        self.rows += len(a)


def kronecker_factors(
    public: Public, model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]
) -> dict[str, Factors]:
    """Of each layer, by path, that the losses of public batches reach, at the present weights. Nothing is left on the model."""
    found = {path: Factors() for path in layers}
    anchor = torch.zeros((), device=public.device, requires_grad=True)

    def tap(path: str):
        def hook(module, args, output):
            inputs, output = args[0], output + anchor.to(output.dtype)
            output.register_hook(lambda gradient: found[path].add(inputs, gradient))
            return output

        return hook

    with _at_rest(model):
        handles = [m.register_forward_hook(tap(path)) for path, m in layers.items()]
        try:
            for batch in batches:
                public.loss(model, batch).sum().backward(inputs=[anchor])
        finally:
            for handle in handles:
                handle.remove()
    return {path: one for path, one in found.items() if one.rows}


@dataclass(frozen=True)
class Root:
    """(M + pi I)^(-1/2) of one factor M; the trace of M, and of what this makes of it from both sides."""

    matrix: torch.Tensor
    before: float
    after: float


def inverse_root(factor: torch.Tensor, damping: float) -> Root:
    """`damping`: pi over the mean eigenvalue of M."""
    trace = float(factor.trace())
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(0)
    damped = values + damping * max(trace / len(factor), 1e-30)
    root = ((vectors * damped.rsqrt()) @ vectors.T).contiguous()  # as a checkpoint brings it back
    return Root(root, trace, float((values / damped).sum()))


def linear_layers(
    model: nn.Module, trainable: Mapping[str, torch.Size], widest: int
) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by path, no side longer than `widest`, whose weight trains and is no other module's, too."""
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1
    for path, module in model.named_modules():
        if not (type(module) is nn.Linear or is_transposed(module)) or max(module.weight.shape) > widest:
            continue
        if f"{path}.weight" in trainable and users[id(module.weight)] == 1:
            yield path, module


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and no parameter wants a gradient; afterwards everything is as it was."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p in wanted:
            p.requires_grad_(True)

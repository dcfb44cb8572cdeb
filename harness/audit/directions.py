"""What each canary's gradient is, and what clipping makes of it: by torch.func and published formulas, by no engine's code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpft.harness.engine.clipping import Clipping
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import loop

GAMMA = 0.01  # of auto-s and psac, as published


@dataclass(frozen=True)
class Directions:
    """Of n canaries at the present weights, in the encoded shapes of this step, side by side; fp32.

    units: [n, coordinates], gradients over their norms (zero where a canary has none); norms: [n], in clip norms; clipped:
    [n, coordinates], what each is to add to the sum, in clip norms.
    """

    units: torch.Tensor
    norms: torch.Tensor
    clipped: torch.Tensor

    @property
    def expected(self) -> torch.Tensor:
        """What each adds along its own direction, [n], in clip norms."""
        return (self.units * self.clipped).sum(1)


def directions(setup: loop.Setup, step: int, canaries: Sequence[int]) -> Directions:
    """Of those canaries, as they are to be in this step. A query of nothing is answered by zeros."""
    from torch.func import functional_call, grad, vmap

    model = setup.prepared.model
    parameters = {name: p.detach() for name, p in setup.parameters.items()}
    rest = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in parameters}

    def loss(values, canary):
        batch = {"canary": canary[None], "weight": torch.ones(1)}
        return functional_call(model, (values, rest), (), batch).sum()

    index = torch.as_tensor(list(canaries))
    with _unhooked(model):
        gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, index)
    encodings = encodings_of(setup, step)
    rows = [_encoded(encodings.get(name), g).reshape(len(index), -1) for name, g in gradients.items()]
    flat = torch.cat(rows, 1)
    squares = {name: row.square().sum(1) for name, row in zip(gradients, rows, strict=True)}
    norms = flat.norm(dim=1)
    if setup.method.query == "none":
        clipped = torch.zeros_like(flat)
    else:
        found = factors(setup.spec, squares)
        widths = torch.tensor([row.shape[1] for row in rows])
        by_parameter = torch.stack([found[name] for name in gradients], 1)
        clipped = flat * by_parameter.repeat_interleave(widths, 1) / setup.spec.clip_norm
    return Directions(flat / norms.clamp_min(1e-30)[:, None], norms / setup.spec.clip_norm, clipped)


def factors(spec: RunSpec, squares: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each example's gradient is to be multiplied by, [n] by parameter, from its squared norms [n] by parameter."""
    groups = Clipping(spec.clipping, spec.clip_groups).grouped(squares)  # names alone: which parameters share a bound
    bound, found = spec.clip_norm / len(groups) ** 0.5, {}
    for names in groups.values():
        norm = torch.stack([squares[name] for name in names]).sum(0).sqrt().clamp_min(1e-30)
        if spec.clipping == "auto-s":
            factor = bound / (norm + GAMMA)
        elif spec.clipping == "psac":
            factor = bound / (norm + GAMMA / (norm + GAMMA))
        else:
            factor = (bound / norm).clamp_max(1.0)
        found |= dict.fromkeys(names, factor)
    return found


def encodings_of(setup: loop.Setup, step: int) -> dict[str, Any]:
    """The encodings that the loop asks for in this step, by name."""
    found = {name: setup.method.encoding(name, p, step) for name, p in setup.parameters.items()}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


def _encoded(encoding: Any, gradients: torch.Tensor) -> torch.Tensor:
    return gradients if encoding is None else encoding.finished(encoding.dense(gradients))


@contextlib.contextmanager
def _unhooked(model: torch.nn.Module) -> Iterator[None]:
    """Without the hooks that an engine has put on the model: they are part of what is audited."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, hooks in kept:
            setattr(module, kind, type(hooks)())
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)

"""The rule of any layer that has no rule of its own: its forward, run again on each example alone, and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from dpft.harness.engine import parted
from dpft.harness.engine.pieces import KeptPiece, Piece
from dpft.harness.engine.taps import Use
from dpft.harness.errors import CannotRun
from dpft.harness.query.encoding import Encoding


def alone(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    """Any other layer: its own forward, run again on each example alone and differentiated, vectorised by torch.func.

    What cannot be vectorised (recurrences, experts that choose their tokens) is run on one example after the other.
    """

    def one(use: Use) -> torch.Tensor:
        if use.module not in _ONE_BY_ONE:
            try:
                return _vectorised(use, local)
            except (RuntimeError, ValueError, TypeError) as error:
                if "memory" in str(error):
                    raise
                _ONE_BY_ONE.add(use.module)
        return _one_by_one(use, local)

    try:
        with parted.whole(
            uses[0].module
        ):  # its own forward is run, and what torch.func runs must not exchange anything
            return KeptPiece(encoding.dense(added(one, uses)))
    except (RuntimeError, ValueError, TypeError) as error:
        if "memory" in str(error):
            raise
        kind, path = type(uses[0].module).__name__, uses[0].path
        reason = " ".join(str(error).split())[:200]
        raise CannotRun(
            f"Layer {path} ({kind}) has no per-example gradient rule and cannot be run on examples alone ({reason}); freeze it "
            "or use --engine reference."
        ) from error


_ONE_BY_ONE: WeakSet[nn.Module] = WeakSet()  # what could not be vectorised is not tried again


def _vectorised(use: Use, local: str) -> torch.Tensor:
    places = tuple(None if dim is None else 0 for dim in use.layout.inputs)
    weight = wide(use.module.get_parameter(local).detach())

    def gradient_of(gradients: tuple[torch.Tensor, ...], *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.vjp(lambda value: use.results(_called(use, tensors, local, value)), weight)[1](gradients)[0]

    gradients = tuple(map(wide, use.gradients))
    return torch.func.vmap(gradient_of, (0, *places))(gradients, *_widened(use))


def _one_by_one(use: Use, local: str) -> torch.Tensor:
    tensors, found = _widened(use), []
    for i in range(use.batch_size):
        own = [t if dim is None else t[i] for t, dim in zip(tensors, use.layout.inputs, strict=True)]
        with torch.enable_grad():
            weight = wide(use.module.get_parameter(local).detach()).requires_grad_()
            results = use.results(_called(use, own, local, weight))
            pairs = [(r, wide(g[i])) for r, g in zip(results, use.gradients, strict=True) if r.requires_grad]
            if pairs:
                results, gradients = zip(*pairs, strict=True)
                found += torch.autograd.grad(results, weight, gradients, allow_unused=True, materialize_grads=True)
            else:
                found.append(torch.zeros_like(weight))
    return torch.stack(found)


def _widened(use: Use) -> list[torch.Tensor]:
    return [wide(t) if t.is_floating_point() else t for t in use.tensors]


def _called(use: Use, tensors: Sequence[torch.Tensor], local: str, value: torch.Tensor) -> Any:
    """What the layer returns for one example with `value` for its parameter `local`."""
    caller = _Caller(use, use.alone(tensors))
    return torch.func.functional_call(caller, {f"module.{local}": value}, tie_weights=False)


class _Caller(nn.Module):
    """A use of a layer as a module without arguments, so that functional_call can replace the layer's parameters."""

    def __init__(self, use: Use, tensors):
        super().__init__()
        self.module, self._use, self._tensors = use.module, use, tensors

    def forward(self) -> Any:
        return self._use.call(self.module, self._tensors)


def added(one: Callable[[Use], torch.Tensor], uses: list[Use]) -> torch.Tensor:
    kept = one(uses[0])
    for use in uses[1:]:
        kept = kept + one(use)
    return kept


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""The default engine: one forward and one backward pass, per-example gradients kept as factors.

For a Linear layer the gradient of example b is `E_b^T A_b` (activations A_b [T, d], output gradients E_b [T, p]). Its norm and
the clipped sum come from the factors; autograd never computes a weight gradient (Li et al., 2110.05679; Bu et al., 2210.00038).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from dpft.harness.engine.base import Engine, clip_factors, unused
from dpft.harness.engine.rules import RULES, Use, pieces_of, supported, tied_cross_term


class FactoredEngine(Engine):
    """Taps the input and the output gradient of every layer that owns a trainable parameter.

    Raises CannotRun, naming it, for a layer without a rule, and when a layer sees tokens of several examples in one row.
    """

    name = "factored"

    def __init__(self, model, loss, parameters, clock):
        super().__init__(model, loss, parameters, clock)
        names = {id(p): name for name, p in parameters.items()}
        self._uses: list[Use] = []
        self._recording = False
        self._handles = []
        device = next(iter(parameters.values())).device
        # Requires grad but belongs to no layer: it makes autograd reach every tap and stop at the lowest one.
        self._anchor = torch.zeros(0, device=device, requires_grad=True)
        layers = [
            (
                path,
                module,
                {local: names[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) in names},
            )
            for path, module in model.named_modules()
        ]
        for path, module, owned in layers:
            if owned and not _only_holds(path, module, owned, layers):
                supported(path, module)
                self._handles.append(module.register_forward_hook(self._tap(path, owned)))

    def accumulate(self, batch, total, clip_norm, encodings):
        losses = self._passes(batch)
        with self.clock("clip"):
            pieces = defaultdict(list)
            for name, piece in pieces_of(self._uses, encodings):
                pieces[name].append(piece)
            self._uses = []
            for name in self.parameters:
                if name not in pieces:
                    raise unused(name)
            norms = self._norms(pieces)
            factors = clip_factors(norms, clip_norm)
            for name, parts in pieces.items():
                for part in parts:
                    part.add_weighted(total[name], factors.to(part.dtype))
        return losses, norms

    def close(self):
        for handle in self._handles:
            handle.remove()

    def _passes(self, batch) -> torch.Tensor:
        """Forward and backward with the weights taken out of the graph; fills `self._uses`."""
        self._uses, self._recording = [], True
        self._batch_size = len(next(iter(batch.values())))
        for p in self.parameters.values():
            p.requires_grad_(False)
        try:
            with self.clock("forward"):
                losses = self.losses(batch)
            if not losses.requires_grad:
                raise unused(next(iter(self.parameters)))
            with self.clock("backward"):
                losses.sum().backward()
        finally:
            self._recording = False
            for p in self.parameters.values():
                p.requires_grad_(True)
        return losses.detach()

    def _tap(self, path: str, owned: dict[str, str]):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if not self._recording:
                return None
            use = Use(path, module, owned, args[0].detach())
            use.check(self._batch_size, output)
            self._uses.append(use)
            return _Tap.apply(output, self._anchor, use)

        return hook

    def _norms(self, pieces) -> torch.Tensor:
        """Flat norms over all parameters, [batch], float64; grams of inputs that layers share are made once."""
        grams: dict = {}
        squares = []
        for name, parts in pieces.items():
            squares += [part.squared_norms(grams).double() for part in parts]
            if len(parts) == 2:
                squares.append(2 * tied_cross_term(name, *parts).double())
        return torch.stack(squares).sum(0).clamp_min(0).sqrt()


def _only_holds(path: str, module: nn.Module, owned: dict[str, str], layers: list) -> bool:
    """Whether a module without a rule merely holds parameters of Linear layers inside it.

    The masked-language-model heads of transformers do: `predictions.bias` is `predictions.decoder.bias`.
    """
    if type(module) in RULES:
        return False
    inside = {
        name
        for other, layer, theirs in layers
        if other.startswith(f"{path}.") and isinstance(layer, nn.Linear)
        for name in theirs.values()
    }
    return inside.issuperset(owned.values())


class _Tap(torch.autograd.Function):
    """Identity that hands its output gradient to `use`."""

    @staticmethod
    def forward(ctx, output, anchor, use):
        ctx.use = use
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        ctx.use.output_gradient = gradient
        return (gradient if ctx.needs_input_grad[0] else None), None, None

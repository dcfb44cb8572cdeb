"""One rule per layer type: from a layer's input and output gradient to the norm and the weighted sum of its gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine.encoding import IDENTITY, Encoding
from dpft.harness.errors import CannotRun


@dataclass
class Use:
    """One call of a layer: its input, and after the backward pass the gradient of its output."""

    path: str
    module: nn.Module
    owned: dict[str, str]  # the layer's own name of a trainable parameter -> its name in the model
    input: torch.Tensor
    output_gradient: torch.Tensor | None = field(default=None)

    def check(self, batch_size: int, output: torch.Tensor) -> None:
        """Raises CannotRun unless row i of the input and of the output belongs to example i."""
        if len(self.input) != batch_size or len(output) != batch_size:
            raise CannotRun(
                f"Layer {self.path} sees {len(self.input)} rows for {batch_size} examples, so their gradients cannot be "
                "told apart; give it one row per example, freeze it, or use --engine reference."
            )


@dataclass
class LinearPiece:
    """Gradient `E_b^T A_b` of a weight [p, d]; A [b, T, d], E [b, T, p]. Several uses are joined along T."""

    inputs: torch.Tensor
    gradients: torch.Tensor

    def squared_norms(self, grams: dict) -> torch.Tensor:
        """||E_b^T A_b||^2 by the T x T grams of the factors: T^2 (d + p) instead of T d p."""
        key = (self.inputs.data_ptr(), self.inputs.shape, self.inputs.stride())
        if key not in grams:
            grams[key] = self.inputs @ self.inputs.mT
        return (grams[key] * (self.gradients @ self.gradients.mT)).sum((1, 2))

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        weighted = self.gradients * factors[:, None, None]
        total.addmm_(weighted.flatten(0, 1).T, self.inputs.flatten(0, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


@dataclass
class EmbeddingPiece:
    """Gradient of an embedding table [vocabulary, d]: row v gets the sum of E over the tokens equal to v."""

    tokens: torch.Tensor
    gradients: torch.Tensor

    def squared_norms(self, grams: dict) -> torch.Tensor:
        """Sum of <E_t, E_s> over the pairs of equal tokens; the one-hot [b, T, vocabulary] is never formed."""
        same = self.tokens[:, :, None] == self.tokens[:, None, :]
        return ((self.gradients @ self.gradients.mT) * same).sum((1, 2))

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        weighted = self.gradients * factors[:, None, None]
        total.index_add_(0, self.tokens.flatten(), weighted.flatten(0, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


@dataclass
class KeptPiece:
    """Materialised per-example gradients [b, ...] of a small parameter."""

    gradients: torch.Tensor

    def squared_norms(self, grams: dict) -> torch.Tensor:
        return self.gradients.flatten(1).square().sum(1)

    def add_weighted(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        total.add_(torch.einsum("b,b...->...", factors, self.gradients))

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype


Piece = LinearPiece | EmbeddingPiece | KeptPiece


def tied_cross_term(name: str, first: Piece, second: Piece) -> torch.Tensor:
    """<G_embedding, G_linear> per example for a table that is also an output layer; added twice to the squared norm."""
    if isinstance(second, EmbeddingPiece):
        first, second = second, first
    if not isinstance(first, EmbeddingPiece) or isinstance(second, EmbeddingPiece):
        raise CannotRun(
            f"The parameter {name} is shared by layers of kinds that have no joint rule; use --engine reference."
        )
    if isinstance(second, KeptPiece):
        rows = second.gradients.gather(1, first.tokens[:, :, None].expand(-1, -1, second.gradients.shape[2]))
        return (rows * first.gradients).sum((1, 2))
    index = first.tokens[:, None, :].expand(-1, second.gradients.shape[1], -1)
    return (second.gradients.gather(2, index) * (second.inputs @ first.gradients.mT)).sum((1, 2))


def _linear(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    gradients = encoding.rows(_joined([_rows(u.output_gradient) for u in uses]))
    if local == "bias":
        return KeptPiece(gradients.sum(1))
    inputs = encoding.columns(_joined([_rows(u.input) for u in uses]))
    tokens, d, p = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    if tokens * (d + p) > d * p:  # thin layers (heads, adapters): cheaper to keep than to take grams of
        return KeptPiece(gradients.mT @ inputs)
    return LinearPiece(inputs, gradients)


def _embedding(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    module, name = uses[0].module, uses[0].owned[local]
    if encoding.left is not None or module.max_norm is not None or module.scale_grad_by_freq:
        raise CannotRun(f"Embedding {name} has max_norm, scale_grad_by_freq or a row encoding; use --engine reference.")
    tokens = torch.cat([u.input.flatten(1) for u in uses], 1)
    gradients = encoding.columns(_joined([_rows(u.output_gradient) for u in uses]))
    if module.padding_idx is not None:  # autograd gives the padding row no gradient
        gradients = gradients * (tokens != module.padding_idx)[:, :, None]
    return EmbeddingPiece(tokens, gradients)


def _layer_norm(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    kept = 0
    for use in uses:
        gradient = _wide(use.output_gradient)
        if local == "weight":
            shape = use.module.normalized_shape
            gradient = gradient * F.layer_norm(use.input.to(gradient.dtype), shape, eps=use.module.eps)
        middle = tuple(range(1, gradient.dim() - len(use.module.normalized_shape)))
        kept = kept + (gradient.sum(middle) if middle else gradient)
    return KeptPiece(encoding.dense(kept))


def _by_opacus(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    samplers, kept = _opacus_samplers(), 0
    for use in uses:
        gradient = _wide(use.output_gradient)
        sampler = samplers[type(use.module)]
        kept = kept + sampler(use.module, [use.input.to(gradient.dtype)], gradient)[getattr(use.module, local)]
    return KeptPiece(encoding.dense(kept))


RULES = {nn.Linear: _linear, nn.Embedding: _embedding, nn.LayerNorm: _layer_norm}


def supported(path: str, module: nn.Module) -> None:
    """Raises CannotRun, naming the layer, when there is no rule for it here or in Opacus."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise CannotRun(f"Layer {path} is a BatchNorm, which mixes examples; convert it to GroupNorm.")
    if type(module) not in RULES and type(module) not in _opacus_samplers():
        raise CannotRun(
            f"Layer {path} ({type(module).__name__}) has no per-example gradient rule; freeze it or use --engine reference."
        )


def pieces_of(uses: list[Use], encodings: dict[str, Encoding]) -> Iterator[tuple[str, Piece]]:
    """(parameter name, piece) for all uses of one pass; uses of one kind of layer are joined into one piece."""
    grouped: dict[tuple, list[Use]] = defaultdict(list)
    for use in uses:
        if use.output_gradient is None:
            continue
        for local, name in use.owned.items():
            grouped[name, local, type(use.module)].append(use)
    for (name, local, kind), group in grouped.items():
        rule = RULES.get(kind, _by_opacus)
        yield name, rule(group, local, encodings.get(name, IDENTITY))


def _opacus_samplers() -> dict:
    from opacus.grad_sample import GradSampleHooks

    return GradSampleHooks.GRAD_SAMPLERS


def _rows(factor: torch.Tensor) -> torch.Tensor:
    """[b, ..., n] as [b, T, n], fp32 at least: the norm that is clipped is the norm of what is summed."""
    return _wide(factor).reshape(len(factor), -1, factor.shape[-1])


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _joined(factors: list[torch.Tensor]) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors, 1)

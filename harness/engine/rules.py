"""One rule per layer type: from the inputs and output gradients of a layer's uses to a piece of each parameter's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from dpft.harness.engine import parted
from dpft.harness.engine.alone import added, alone, wide
from dpft.harness.engine.cost import cheaper_kept
from dpft.harness.engine.fakes import has_values
from dpft.harness.engine.hidden import ordinary, refuse_hidden
from dpft.harness.engine.pieces import EmbeddingPiece, KeptPiece, LinearPiece, Piece, RecomputedPiece
from dpft.harness.engine.taps import Use
from dpft.harness.errors import CannotRun
from dpft.harness.query.encoding import Encoding
from dpft.harness.query.layers import is_transposed

Rule = Callable[[list[Use], str, Encoding], Piece]


def rule_for(path: str, module: nn.Module) -> Rule:
    """The rule of a layer. Raises CannotRun, naming it, for a layer that is known to mix examples or hides what it does."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        _refuse_batch_statistics(path, module)
    rule = _by_type(module)
    refuse_hidden(path, module, by_type=rule not in (alone, _recomputed, _batch_norm))
    return rule


def around(path: str, module: nn.Module) -> Rule:
    """The rule of a parameter of a layer inside `module`. Raises CannotRun as `rule_for`."""
    refuse_hidden(path, module, by_type=False)
    return alone


def _refuse_batch_statistics(path: str, module: nn.Module) -> None:
    """In evaluation mode, with running statistics, BatchNorm is a scale and a shift, and mixes nothing."""
    if module.training or module.running_mean is None:
        raise CannotRun(
            f"Layer {path} is a BatchNorm that normalises by its batch, which mixes examples; convert it to GroupNorm, or keep "
            "it in evaluation mode by a `train` of its own, as batch_norm=group and =frozen of image tasks do."
        )


def _batch_norm(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    _refuse_batch_statistics(uses[0].path, uses[0].module)  # its mode may be another one by now
    return alone(uses, local, encoding)


def _by_type(module: nn.Module) -> Rule:
    if isinstance(module, nn.Embedding):
        return _embedding
    if hasattr(module, "linear_factors"):
        return _recomputed
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm
    if parted.has_own_forward(module):  # put on the instance: its type says nothing
        return alone
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and _plain(module) and ordinary(module):
        return _convolution
    if is_transposed(module):
        return _transposed_linear
    if type(module).__name__.endswith("RMSNorm") and [n for n, _ in module.named_parameters()] == ["weight"]:
        return _scale
    return _RULES.get(type(module), alone)


def _linear(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    gradients = encoding.rows(_joined([_rows(u.gradient) for u in uses]))
    if local == "bias":
        return KeptPiece(gradients.sum(1))
    return _matrix(encoding.columns(_joined([_rows(u.input) for u in uses])), gradients)


def _transposed_linear(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    """GPT-2's Conv1D: the weight is [d, p], its gradient `A^T E`."""
    gradients = _joined([_rows(u.gradient) for u in uses])
    if local == "bias":
        return KeptPiece(encoding.rows(gradients).sum(1))
    return _matrix(encoding.columns(gradients), encoding.rows(_joined([_rows(u.input) for u in uses])))


def _matrix(inputs: torch.Tensor, gradients: torch.Tensor) -> Piece:
    """The gradient `E^T A` as factors A [b, T, d], E [b, T, p], or materialised where that is cheaper on this device."""
    if cheaper_kept(inputs, gradients.shape[2]):
        thin_first = gradients.shape[2] <= inputs.shape[2]  # four times as fast here as the other way round
        return KeptPiece(gradients.mT @ inputs if thin_first else (inputs.mT @ gradients).mT)
    return LinearPiece(inputs, gradients)


def _recomputed(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    """A layer that makes its factors again when asked, as `tasks.vocabulary.VocabularyLoss` does: they are never held.

    It has `linear_factors(tensors, gradient, examples)` and `at_once`, the numbers of E that may exist at once.
    """
    module = uses[0].module
    calls = [(u.tensors, wide(u.gradient)) for u in uses]  # not the uses: they are emptied

    @torch.no_grad()
    def factors(examples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        made = [module.linear_factors(tensors, gradient, examples) for tensors, gradient in calls]
        inputs, gradients = (_joined(list(side)) for side in zip(*made, strict=True))
        return encoding.columns(inputs), encoding.rows(gradients)

    size = len(calls[0][1])
    positions = sum(tensors[0].shape[1] for tensors, _ in calls)
    step = max(1, module.at_once // (positions * len(getattr(module, local))))
    slices = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    return RecomputedPiece(factors, slices, calls[0][1].dtype)


def _convolution(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    """Conv1d and Conv2d: a Linear layer on patches (2110.05679 for ghost norms; groups are materialised)."""
    gradients = _joined([_rows(u.flat(u.gradient).flatten(2).mT, u) for u in uses])
    if local == "bias":
        return KeptPiece(encoding.rows(gradients).sum(1))
    module = uses[0].module
    patches = _joined([_rows(_patches(module, wide(u.flat(u.input))), u) for u in uses])
    if module.groups == 1:
        return _matrix(encoding.columns(patches), encoding.rows(gradients))
    size, positions = patches.shape[:2]
    split = (size, positions, module.groups, -1)
    kept = torch.einsum("btgo,btgi->bgoi", gradients.reshape(split), patches.reshape(split))
    return KeptPiece(encoding.dense(kept.reshape(size, *module.weight.shape)))


def _patches(module: nn.Conv1d | nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
    """[b, positions, channels * kernel] of an input [b, channels, ...]."""
    options = [module.kernel_size, module.dilation, module.padding, module.stride]
    if image.dim() == 3:  # one dimension is two of which the first is 1
        image, options = image[:, :, None], [(fill, *o) for fill, o in zip((1, 1, 0, 1), options, strict=True)]
    return F.unfold(image, *options).mT


def _plain(module: nn.Conv1d | nn.Conv2d) -> bool:
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _embedding(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    """A table. Of rows that are kept by a vector the tokens become places among them; others, and padding, count nothing."""
    name = uses[0].owned[local]
    if any(u.module.max_norm is not None for u in uses):
        raise CannotRun(
            f"Embedding {name} has max_norm, which rescales its rows as examples look them up; set max_norm=None."
        )
    if any(u.module.scale_grad_by_freq for u in uses) or (encoding.left is not None and encoding.left.dim() != 1):
        raise CannotRun(f"Embedding {name} has scale_grad_by_freq or a dense row encoding; use --engine reference.")
    gradients = encoding.columns(_joined([_rows(u.gradient) for u in uses]))
    tokens = torch.cat([u.input.reshape(u.batch_size, -1) for u in uses], 1)
    counts = None
    if any(u.module.padding_idx is not None for u in uses):  # autograd gives the padding row no gradient
        paddings = [-1 if u.module.padding_idx is None else u.module.padding_idx for u in uses]
        counts = torch.cat([u.input.reshape(u.batch_size, -1) != p for u, p in zip(uses, paddings, strict=True)], 1)
    if encoding.left is not None:
        tokens, kept = _among(encoding.left, tokens, uses[0])
        counts = (kept if counts is None else kept & counts).to(gradients.dtype) * encoding.scale
    return EmbeddingPiece(tokens, gradients if counts is None else gradients * counts[:, :, None])


# rows that have been looked at, once for all microbatches and steps: a look waits for a card
_ORDERED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _among(rows: torch.Tensor, tokens: torch.Tensor, use: Use) -> tuple[torch.Tensor, torch.Tensor]:
    """(places of the tokens among the rows of a table that are kept, 0 for those that are not; which ones are). Both [b, T]."""
    vocabulary = use.module.num_embeddings
    if has_values(rows) and _ORDERED.get(rows) != (rows._version, vocabulary):
        if not bool((rows.diff() > 0).all() & (rows[0] >= 0) & (rows[-1] < vocabulary)):
            raise RuntimeError(
                f"The rows kept of the table of {use.path} must be distinct, ascending and among its {vocabulary}; sort them."
            )
        _ORDERED[rows] = (rows._version, vocabulary)
    tokens = tokens.to(rows.dtype)
    places = torch.searchsorted(rows, tokens).clamp_max(len(rows) - 1)
    kept = rows[places] == tokens
    return places * kept, kept


def _layer_norm(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    def one(use: Use) -> torch.Tensor:
        gradient, shape = wide(use.gradient), use.module.normalized_shape
        if local == "weight":
            gradient = F.layer_norm(use.input.to(gradient.dtype), shape, eps=use.module.eps).mul_(gradient)
        return gradient.reshape(len(gradient), -1, *shape).sum(1)

    return KeptPiece(encoding.dense(added(one, uses)))


def _group_norm(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    def one(use: Use) -> torch.Tensor:
        gradient = wide(use.flat(use.gradient))
        if local == "weight":
            module, image = use.module, use.flat(use.input).to(gradient.dtype)
            gradient = F.group_norm(image, module.num_groups, eps=module.eps).mul_(gradient)
        summed = gradient.reshape(*gradient.shape[:2], -1).sum(2)  # of an input [b, channels], too
        return summed.view(use.batch_size, -1, gradient.shape[1]).sum(1)

    return KeptPiece(encoding.dense(added(one, uses)))


def _scale(uses: list[Use], local: str, encoding: Encoding) -> Piece:
    """RMSNorm of any make: the output is linear in the weight, so its derivative is f(1) - f(0), by the layer's own code."""

    def one(use: Use) -> torch.Tensor:
        gradient, weight = wide(use.gradient), use.module.weight
        bare = copy.copy(use.module)
        at = []
        for value in (torch.ones_like(weight), torch.zeros_like(weight)):
            bare._parameters = {"weight": value}
            at.append(bare.forward(use.input).to(gradient.dtype))
        return ((at[0] - at[1]) * gradient).reshape(len(gradient), -1, *weight.shape).sum(1)

    return KeptPiece(encoding.dense(added(one, uses)))


_RULES: dict[type[nn.Module], Rule] = {nn.Linear: _linear, nn.LayerNorm: _layer_norm, nn.GroupNorm: _group_norm}


def _rows(factor: torch.Tensor, use: Use | None = None) -> torch.Tensor:
    """[b, ..., n] as [b, T, n], fp32 at least: the norm that is clipped is the norm of what is summed. use: of a flat factor."""
    return wide(factor).reshape(len(factor) if use is None else use.batch_size, -1, factor.shape[-1])


def _joined(factors: list[torch.Tensor]) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors, 1)

"""DeBERTa-v2's relative positions (2006.03654): one table for the whole batch, of which each example gets its own copy.

Every attention takes them through its own projections, which then see one row for all examples and add up their gradients. While
gradients are recorded the table is looked up, normalised and projected for each example: two more projections of twice as many
positions as there are buckets. What is computed is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from dpft.harness.engine.taps import Recorder

HOME = "transformers.models.deberta_v2.modeling_deberta_v2"


def separate(model: nn.Module, recorder: Recorder) -> Callable[[], None]:
    """Give each example its own relative positions where `recorder` wants it apart. Returns what undoes it."""
    changed = []
    for module in model.modules():
        method, made = _MADE.get((type(module).__module__, type(module).__name__), (None, None))
        if method is not None and module.relative_attention:
            setattr(module, method, made(module, recorder))
            changed.append((module, method))

    def undo() -> None:
        for module, method in changed:
            vars(module).pop(method, None)

    return undo


def _table(encoder: nn.Module, recorder: Recorder) -> Callable:
    """The encoder's `get_rel_embedding`: [batch, positions, width] for [positions, width]."""

    def get_rel_embedding() -> torch.Tensor:
        if not recorder.apart:
            return type(encoder).get_rel_embedding(encoder)
        table = encoder.rel_embeddings
        rows = torch.arange(table.num_embeddings, device=table.weight.device)
        found = table(rows.expand(recorder.apart, -1))
        return encoder.LayerNorm(found) if "layer_norm" in encoder.norm_rel_ebd else found

    return get_rel_embedding


def _bias(attention: nn.Module, _: Recorder) -> Callable:
    """An attention's `disentangled_attention_bias`, by its own code, with positions that were projected for each example."""
    kind = type(attention)

    def bias(query, key, relative_pos, rel_embeddings, scale_factor) -> torch.Tensor:
        if rel_embeddings.dim() == 2:
            return kind.disentangled_attention_bias(attention, query, key, relative_pos, rel_embeddings, scale_factor)
        positions = rel_embeddings[:, : 2 * attention.pos_ebd_size]
        twin, heads = copy.copy(attention), attention.num_attention_heads
        projected = {name: _Given(getattr(attention, name)(positions)) for name in _projections(attention)}
        twin._modules = {**attention._modules, **projected}
        twin.num_attention_heads = heads * len(positions)  # as if the batch were one example: nothing is repeated
        twin.transpose_for_scores = lambda states, _: attention.transpose_for_scores(states, heads)
        return kind.disentangled_attention_bias(twin, query, key, relative_pos, rel_embeddings[0], scale_factor)

    return bias


class _Given(nn.Module):
    """In the place of a projection: what it made of all examples' positions."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self._value = value

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self._value


def _projections(attention: nn.Module) -> list[str]:
    if attention.share_att_key:
        return ["query_proj", "key_proj"]
    own = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    return [name for kind, name in own.items() if kind in attention.pos_att_type]


_MADE = {
    (HOME, "DebertaV2Encoder"): ("get_rel_embedding", _table),
    (HOME, "DisentangledSelfAttention"): ("disentangled_attention_bias", _bias),
}

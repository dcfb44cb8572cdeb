"""Prefix tuning (Li & Liang, 2101.00190): keys and values in front of every layer's own train, and the head."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import CannotRun
from dpft.methods.base import Method
from dpft.methods.prompt import body_of, table_of

if TYPE_CHECKING:
    import torch
    from torch import nn

# What attention layers are told to compute with, in transformers' own registry of such functions.
FIRST, JOINED = "dpft-prefix-first", "dpft-prefix"


class PrefixTuning(Method):
    """Every attention layer has vectors p [tokens, keys and values], which its queries see beside the text's keys and values.

    They train, and the head; everything else is frozen. Every example looks them up, as it looks up words, so each has a
    gradient of its own; vectors broadcast over the batch would have one for all. The text keeps its positions, its length and
    its first token; every token sees the whole prefix, with rotary positions as if it had been turned already.

    They start as the keys and values that the model itself has for words of the vocabulary that the method's generator draws:
    the start from real words of the paper's section 7.4. As in PEFT, without its `prefix_projection`, they train themselves; an
    MLP that makes them, as in the paper, would have one input for all examples. PEFT hands them over as a cache of past keys,
    which encoders do not take (PEFT 0.21 refuses BERT of transformers 5) and which moves the text to later positions; here they
    join inside of attention, where the architecture asks transformers' registry how to compute it. tokens: 10, the paper's best
    for table-to-text (section 7.1).

    Prediction: between prompt, which has a layer of them, and dp-lora.
    """

    name = "prefix"
    summary = "keys and values beside those of every attention layer, and head"
    reference = "arXiv:2101.00190"
    claim = "no privacy: level with full tuning, GPT-2, table-to-text, 0.1% of its weights (arXiv:2101.00190, abstract)"
    defaults: ClassVar = {"optimizer": "adam", "lr": 1e-2, "clip_norm": 2.0}
    options: ClassVar = {"tokens": 10, "head_lr_factor": 1.0}
    ranges: ClassVar = {"tokens": (1, 4096)}

    def skip(self, model: nn.Module) -> str | None:
        body = body_of(model)
        if table_of(body) is None:
            return "prefix starts from words and this model has no table of them; use dp-lora."
        layers = attention_layers(body)
        if not layers or any(getattr(layer.config, "_attn_implementation", None) != "sdpa" for layer in layers):
            return "prefix needs attention that transformers computes (sdpa) and this model has its own; use dp-lora."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch
        from transformers.modeling_utils import AttentionInterface

        from dpft.harness.query.public import evaluating

        AttentionInterface.register(FIRST, _first)
        AttentionInterface.register(JOINED, _joined)
        model.requires_grad_(False)
        body = body_of(model)
        layers, vocabulary = attention_layers(body), table_of(body).num_embeddings
        words = torch.randint(vocabulary, (1, self.settings["tokens"]), generator=generator)
        for layer in layers:  # a configuration of its own: the masks are still made for sdpa
            layer.config = copy.deepcopy(layer.config)
            layer.config._attn_implementation = FIRST
        with evaluating(model), torch.no_grad():
            body(input_ids=words, attention_mask=torch.ones_like(words))
        if not all(hasattr(layer, "prefix") for layer in layers):
            raise CannotRun("prefix needs attention in every layer of the model and some has none; use dp-lora.")
        head, own = set(model.head_parameters), {id(layer.prefix.weight) for layer in layers}
        for layer in layers:
            layer.config._attn_implementation = JOINED
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head or id(parameter) in own)
        return model


def attention_layers(body: nn.Module) -> list[nn.Module]:
    """The layers that ask transformers' registry which function computes their attention; all know whether they look ahead."""
    return [module for module in body.modules() if hasattr(module, "is_causal") and hasattr(module, "config")]


def _first(
    layer: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention on words alone, whose keys and values [1, heads, tokens, size] become the layer's prefix."""
    import torch
    from torch import nn
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (key, value)], 1)
    layer.prefix = nn.Embedding.from_pretrained(rows.detach().clone(), freeze=False)
    return sdpa_attention_forward(layer, query, key, value, mask, **more)


def _joined(
    layer: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the layer's prefix in front of keys and values [b, heads, length, size]; the cache never holds it."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    size, heads, length, width = key.shape
    count, asking = layer.prefix.num_embeddings, query.shape[2]
    rows = layer.prefix(torch.arange(count, device=key.device).expand(size, -1)).to(key.dtype)
    keys, values = (
        part.view(size, count, heads, -1).transpose(1, 2)
        for part in rows.split([heads * width, rows.shape[-1] - heads * width], -1)
    )
    causal = more.pop("is_causal", None)
    if mask is None and (layer.is_causal if causal is None else causal) and asking > 1:
        mask = torch.ones(asking, length, dtype=torch.bool, device=key.device).tril()[None, None]
    if mask is not None:  # additive, or whether a key is seen
        mask = torch.nn.functional.pad(mask, (count, 0), value=mask.dtype == torch.bool)
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return sdpa_attention_forward(layer, query, key, value, mask, is_causal=False, **more)

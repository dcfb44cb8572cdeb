"""Prompt tuning (Lester et al., 2104.08691): vectors among the inputs train, and the head; the model is frozen."""

from __future__ import annotations

import contextlib
import inspect
import types
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import nn


class PromptTuning(Method):
    """Vectors p [tokens, width] join the embedded words of every input. They train, and the head; everything else is frozen.

    Every example looks them up, as it looks up words, so each has a gradient of its own; vectors broadcast over the batch would
    have one for all. They start as embeddings of words of the vocabulary that the method's generator draws. The text keeps the
    positions that it was pretrained with, and loses none of its length:

    - decoders: in front of the text. Rotary models count on from them, and distances in the text stay; where positions are a
      table, all have the first one.
    - encoders with a table of positions: all at the first position. Attention does not know the order of its tokens, so they
      stand behind the text: the first token is still the one that a pooler reads, and no prompt depends on how far a batch is
      padded.

    The output forgets them: pooling, targets and masks see the text alone. PEFT's rows are an `nn.Embedding`, too, but its prompt
    tuning wraps and renames the whole model and shifts an encoder's positions. tokens: 20.

    Prediction: clearly worse than adapters in as few steps as a private run has, and near last-layer.
    """

    name = "prompt"
    summary = "vectors beside the input embeddings, and head"
    reference = "arXiv:2104.08691"
    claim = "no privacy: level with full tuning from billions of weights on, T5 (arXiv:2104.08691, abstract)"
    defaults: ClassVar = {"optimizer": "adam", "lr": 1e-2, "clip_norm": 2.0}
    options: ClassVar = {"tokens": 20, "head_lr_factor": 1.0}
    ranges: ClassVar = {"tokens": (1, 4096)}

    def skip(self, model: nn.Module) -> str | None:
        body = body_of(model)
        if table_of(body) is None:
            return "prompt joins tokens of a text and this model has no table of them; use dp-lora."
        if not {"inputs_embeds", "position_ids"} <= inspect.signature(body.forward).parameters.keys():
            return "prompt needs a model that takes embedded inputs and positions and this one does not; use dp-lora."
        if _looks_ahead(body) and _by_order(body):
            return "prompt needs positions that are given, and this encoder takes them from the order of tokens; use dp-lora."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch
        from torch import nn

        model.requires_grad_(False)
        body, count = body_of(model), self.settings["tokens"]
        table = body.get_input_embeddings()
        words = torch.randint(table.num_embeddings, (count,), generator=generator)
        with torch.no_grad():
            body.prompt = nn.Embedding.from_pretrained(table(words).detach().clone(), freeze=False)
        body.forward = types.MethodType(_with_prompt, body)
        head = set(model.head_parameters)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head or parameter is body.prompt.weight)
        return model


def body_of(model: nn.Module) -> nn.Module | None:
    """What turns tokens into hidden states: the model's encoder, or the base of the transformers model inside."""
    if hasattr(model, "encoder"):
        return model.encoder
    return next((module.base_model for module in model.modules() if hasattr(module, "base_model")), None)


def table_of(body: nn.Module | None) -> nn.Embedding | None:
    """The table of the words of such a body; None where it has none."""
    table = None
    if hasattr(body, "get_input_embeddings"):
        with contextlib.suppress(NotImplementedError):  # what transformers raises of models for images
            table = body.get_input_embeddings()
    return table if hasattr(table, "num_embeddings") else None


def _looks_ahead(body: nn.Module) -> bool:
    """Whether a token sees those behind it: whatever is not known as a language model that writes."""
    import transformers

    kind = type(getattr(body, "config", None))
    masked, causal = transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return kind in masked or kind not in causal


def _by_order(body: nn.Module) -> bool:
    """Whether an encoder's attention looks at how far apart two tokens stand, whatever positions they are given."""
    config = getattr(body, "config", None)
    relative = ("relative_attention", "relative_attention_num_buckets")
    named = str(getattr(config, "position_embedding_type", "absolute"))
    return any(getattr(config, key, None) for key in relative) or named.startswith("relative")


def _first(body: nn.Module) -> int:
    """The position of a text's first token."""
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # RoBERTa's: positions count on from behind it
    return 0 if padding is None else padding + 1


def _with_prompt(body: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of `body`, its own class's with the prompt among the inputs and without it in the output."""
    import torch

    plain = type(body).forward
    bound = inspect.signature(plain).bind_partial(body, *args, **kwargs).arguments
    bound.pop("self", None)
    given = {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})
    ids, count = given.pop("input_ids"), body.prompt.num_embeddings
    size, length = ids.shape
    words = body.get_input_embeddings()(ids)
    given.pop("inputs_embeds", None)
    cache = given.get("cache", given.get("past_key_values"))  # the second is its name in older releases
    behind, begun = _looks_ahead(body), cache is not None and cache.get_seq_length() > 0

    def joined(text: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return torch.cat([text, prompt] if behind else [prompt, text], 1)

    mask = given.get("attention_mask")
    mask = ids.new_ones(size, length) if mask is None else mask
    places, first = given.get("position_ids"), _first(body)
    if places is None:
        counted = torch.arange(length, device=ids.device).expand(size, -1)
        places = first + (counted if behind else (mask.cumsum(1) - 1).clamp_min(0)[:, -length:].long())
    own = places.new_full((count,), first)
    if not behind and any(name.endswith("rotary_emb") for name, _ in body.named_modules()):
        places, own = places + count, torch.arange(count, device=ids.device)
    if not begun:  # later tokens find the prompt in the cache
        tokens = torch.arange(count, device=ids.device).expand(size, -1)
        words, places = joined(words, body.prompt(tokens).to(words.dtype)), joined(places, own.expand(size, -1))
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = joined(given["token_type_ids"], ids.new_zeros(size, count))
    given |= {"attention_mask": joined(mask, mask.new_ones(size, count)), "position_ids": places}
    output = plain(body, inputs_embeds=words, **given)
    if not begun:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden[:, :length] if behind else hidden[:, count:]
    return output

"""Which layers of a model get adapters where nobody says: the projections of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpft.harness.query.layers import is_linear

if TYPE_CHECKING:
    from torch import nn

# By the names that architectures give them; the first group that a model has all of is used. What these were always taken for
# in a run, they stay: all three, where PEFT takes two.
SPLIT = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("q_proj", "k_proj", "v_proj"),  # OPT, Llama, Qwen, ViT
    ("c_attn",),  # GPT-2
)
# Of what neither SPLIT nor PEFT knows.
OTHERS = (
    ("q", "k", "v"),
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),  # ModernBERT
    ("qkv",),
    ("in_proj",),
)
SHOWN = 6  # names in a sentence


def attention_projections(model: nn.Module) -> list[str]:
    """Names that the paths of the layers end in; [] of a model that has none that are known.

    SPLIT, then what PEFT takes by default for the model's type (its own list, fused projections among them), then OTHERS.
    """
    paths = [path for path, _ in model.named_modules()]
    ends = {path.rsplit(".", 1)[-1] for path in paths}
    for group in SPLIT:
        if ends.issuperset(group):
            return list(group)
    linear = linear_ends(model)
    for group in (*_of_peft(model), *OTHERS):
        if linear.keys() >= set(group):
            return list(group)
    return []


def linear_ends(model: nn.Module) -> dict[str, int]:
    """Ends of the paths of linear layers outside the head, where all modules that end so are such: how many there are."""
    head = {name.rpartition(".")[0] for name in model.head_parameters}
    found: dict[str, int] = {}
    others = set()
    for path, module in model.named_modules():
        end = path.rsplit(".", 1)[-1]
        if is_linear(module) and path not in head:
            found[end] = found.get(end, 0) + 1
        else:
            others.add(end)
    return {end: count for end, count in found.items() if end not in others}


def unknown_projections(name: str, model: nn.Module) -> str:
    """Why a method called `name` skips a model that has none that are known, and what to do."""
    found = linear_ends(model)
    if not found:
        return (
            f"{name} adapts linear layers, and this model has none outside its head; take a method that trains others."
        )
    shown = sorted(found, key=lambda end: -found[end])[:SHOWN]
    many = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{name} knows no attention projections of this model; say which of its linear layers to adapt, for example "
        f"--set targets={','.join(shown[:2])} (there are {', '.join(f'{end} ({found[end]})' for end in shown)}{many})."
    )


def _of_peft(model: nn.Module) -> Sequence[tuple[str, ...]]:
    """PEFT's default for the type of the model; none where it has none, or one that is no list of names."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    names = known.get(getattr(getattr(model, "config", None), "model_type", None))
    return () if names is None or isinstance(names, str) else (tuple(names),)

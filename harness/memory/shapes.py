"""Published shapes of models, so that their memory can be predicted offline.

Sources: the `config.json` of each checkpoint on the hub; `parameters` are those of the published checkpoint, counted without a
task's own head (`heads` says what of it is one), and a test counts them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """kind: transformers' model_type; settings: of its config; parameters: of `counted`, a transformers class."""

    kind: str
    settings: dict[str, Any]
    parameters: int
    counted: str


def _roberta(width: int, layers: int, heads: int, parameters: int) -> Shape:
    return Shape(
        "roberta",
        {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "pad_token_id": 1,
        },
        parameters,
        "RobertaModel",
    )


def _gpt2(width: int, layers: int, heads: int, parameters: int) -> Shape:
    return Shape("gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}, parameters, "GPT2LMHeadModel")


def _opt(width: int, layers: int, heads: int, parameters: int) -> Shape:
    return Shape(
        "opt",
        {
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": 4 * width,
        },
        parameters,
        "OPTForCausalLM",
    )


def _llama(width: int, layers: int, heads: int, inner: int, head_dim: int, parameters: int) -> Shape:
    return Shape(
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "intermediate_size": inner,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
        parameters,
        "LlamaForCausalLM",
    )


def _qwen2(width: int, layers: int, heads: int, inner: int, parameters: int) -> Shape:
    return Shape(
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "intermediate_size": inner,
            "tie_word_embeddings": True,
        },
        parameters,
        "Qwen2ForCausalLM",
    )


def _vit(width: int, heads: int, parameters: int) -> Shape:
    """Patches of 16 in an image of 224 x 224, 12 layers; DeiT without distillation is a ViT."""
    return Shape(
        "vit",
        {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, "num_labels": 1000},
        parameters,
        "ViTForImageClassification",
    )


SHAPES: dict[str, Shape] = {
    "roberta-base": _roberta(768, 12, 12, 124_645_632),
    "roberta-large": _roberta(1024, 24, 16, 355_359_744),
    "gpt2": _gpt2(768, 12, 12, 124_439_808),
    "gpt2-medium": _gpt2(1024, 24, 16, 354_823_168),
    "gpt2-large": _gpt2(1280, 36, 20, 774_030_080),
    "gpt2-xl": _gpt2(1600, 48, 25, 1_557_611_200),
    "opt-1.3b": _opt(2048, 24, 32, 1_315_758_080),
    "opt-2.7b": _opt(2560, 32, 32, 2_651_596_800),
    "opt-6.7b": _opt(4096, 32, 32, 6_658_473_984),
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, 64, 1_235_814_400),
    "llama-3.2-3b": _llama(3072, 28, 24, 8192, 128, 3_212_749_824),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 4864, 494_032_768),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 8960, 1_543_714_304),
    "vit-b16": _vit(768, 12, 86_567_656),
    "deit-s": _vit(384, 6, 22_050_664),
    "deit-b": _vit(768, 12, 86_567_656),
}

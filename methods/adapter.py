"""Bottleneck adapters inside the blocks (Houlsby et al., 1902.00751), trained privately (Yu et al., 2110.06500)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.layers import is_transposed
from dpft.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import nn

# What a block's two parts end with, before the residual is added: the first group that a model has all of is used.
ENDS = (
    ("attention.output.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa-v2
    ("attention.out_lin", "ffn.lin2"),  # DistilBERT
    ("attention.o_proj", "mlp.fc2"),  # ViT
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Qwen
    ("self_attn.out_proj", "fc2"),  # OPT
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2
    ("dense",),  # one plain layer, as in the model of audits
)
SPREAD = 1e-2  # of the weights at the start, cut at two of it: the paper's


class BottleneckAdapters(Method):
    """`h + U gelu(D h + d) + u` behind attention and behind the MLP of every block, before the residual: D [rank, width], U, d,
    u train.

    Weights start normal with standard deviation .01, cut at two of them, and biases at zero (the paper's): the model starts
    near the pretrained one, and unlike in LoRA both matrices have a gradient in the first step. The paper trains LayerNorms,
    too; here, as in Yu et al., adapters and head alone do. rank 16: 152,000 parameters of MiniLM, where dp-lora has 110,000.
    PEFT has no such adapters, so the module is our own.

    Prediction: level with dp-lora within a point.
    """

    name = "adapter"
    summary = "bottleneck adapters in every block, and head"
    reference = "arXiv:2110.06500"
    claim = "no privacy: within 0.4% of full tuning on GLUE with 3.6% of its weights (arXiv:1902.00751, abstract)"
    defaults: ClassVar = {"optimizer": "adam", "lr": 1e-3, "clip_norm": 2.0}
    options: ClassVar = {"rank": 16, "targets": "blocks", "head_lr_factor": 10.0}
    ranges: ClassVar = {"rank": (1, 1 << 16)}

    def skip(self, model: nn.Module) -> str | None:
        if not self._targets(model):
            return (
                f"{self.name} knows no blocks of this model; set `targets` to the names of layers, with commas between."
            )
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        head = set(model.head_parameters)
        model.requires_grad_(False)
        for path in self._targets(model):
            parent, _, name = path.rpartition(".")
            layer = model.get_submodule(path)
            setattr(model.get_submodule(parent), name, _adapted()(layer, self.settings["rank"], generator))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head or ".adapter_" in name)
        return model

    def _targets(self, model: nn.Module) -> list[str]:
        """Paths of the layers behind which an adapter goes; none that is of the head: its names must not change."""
        head = {name.rpartition(".")[0] for name in model.head_parameters}
        paths = [path for path, module in model.named_modules() if path not in head and _width(module)]
        named = self.settings["targets"]
        for group in ENDS if named == "blocks" else (tuple(named.split(",")),):
            found = {end: [path for path in paths if f".{path}".endswith(f".{end}")] for end in group}
            if all(found.values()):
                return list(dict.fromkeys(path for path in paths if any(path in one for one in found.values())))
        return []


def _width(module: nn.Module) -> int | None:
    """How wide a linear layer's output is: a Linear, or GPT-2's Conv1D; None of any other module."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if is_transposed(module) else None


@cache
def _adapted() -> type[nn.Module]:
    """The class; made inside a function because torch costs seconds to import."""
    from torch import nn
    from torch.nn import functional

    class Adapted(nn.Module):
        """A layer and the adapter behind it."""

        def __init__(self, layer: nn.Module, rank: int, generator: torch.Generator) -> None:
            super().__init__()
            self.layer, width, like = layer, _width(layer), layer.weight
            self.adapter_down = nn.utils.skip_init(nn.Linear, width, rank, dtype=like.dtype)
            self.adapter_up = nn.utils.skip_init(nn.Linear, rank, width, dtype=like.dtype)
            for linear in (self.adapter_down, self.adapter_up):
                nn.init.trunc_normal_(linear.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD, generator=generator)
                nn.init.zeros_(linear.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.layer(x)
            return h + self.adapter_up(functional.gelu(self.adapter_down(h)))

    return Adapted

"""Low-rank adapters whose factors hold more than two matrices, on PEFT's layers: DoRA (2402.09353) and VeRA (2310.11454).

PEFT's own DoRA sends the identity matrix through LoRA's layers, and its VeRA uses parameters outside of the module that owns
them. An engine that looks at layers cannot tell examples apart there, and refuses. Here every parameter that trains is used by a
layer of its own, on rows of one example each. The functions are PEFT's, and the tests compare them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from dpft.methods.lora import DPLoRA
from dpft.methods.lora_layers import ADAPTER, magnitude_layer, scaled_layer

if TYPE_CHECKING:
    import torch
    from torch import nn


class DoRA(DPLoRA):
    """LoRA with a length for each row of a weight: row j of `W0 + s B A` is scaled to the length `m_j`, which trains beside A
    and B.

    `y = m * ((W0 + s B A) x) / n + bias`, with s = alpha / rank, n the lengths of the rows of `W0 + s B A`, and m = n at the
    start. Where gradients are taken n is a constant, as the paper proposes (section 4.3) and PEFT does. It is a function of
    released weights alone, so an example's gradient is that of this definition and depends on no other example, whichever
    engine finds it.

    Prediction: one number per row has a large signal for its noise, so at rank 1 or 2 it gains over dp-lora; at rank 8 within a
    seed's spread.
    """

    name = "dora"
    summary = "LoRA with the length of each row of a weight trained apart (PEFT)"
    reference = "arXiv:2402.09353"
    claim = "no privacy: commonsense 78.4, LLaMA-7B; LoRA 76.3 (github.com/NVlabs/DoRA, commonsense_reasoning)"
    variant: ClassVar = {"use_dora": True}

    def skip(self, model: nn.Module) -> str | None:
        from dpft.harness.engine.fakes import has_values

        reason = super().skip(model)
        ends = tuple(f".{target}" for target in self._targets(model))  # PEFT's rule
        found = [module for path, module in model.named_modules() if f".{path}".endswith(ends)]
        weights = [module.weight for module in found if hasattr(module, "weight")]
        if reason is None and any(has_values(w) and bool((w == 0).all(1).any()) for w in weights if w.dim() == 2):
            return "dora scales rows of a weight to a length, and a row of zeros has none; use dp-lora."
        return reason

    def _finish(self, model: nn.Module) -> None:
        for layer in _adapted(model):
            layer.lora_magnitude_vector[ADAPTER] = magnitude_layer()(layer.lora_magnitude_vector[ADAPTER])


class VeRA(DPLoRA):
    """`y = W0 x + b * B (d * (A x))`: A and B random, frozen and the same in every layer; the vectors d [rank] and b [out] train.

    b starts at zero and d at `d_initial`. A and B are uniform with variance 2 over their inputs, as in PEFT, but drawn by the
    method's generator; layers of several sizes share the part that fits. rank 256 and d_initial .1 are PEFT's defaults. On
    MiniLM a tenth of dp-lora's parameters train, and no product of two noised matrices is taken. lr is ten times dp-lora's: b
    has to grow to about 1 before it matters.

    Prediction: at eps 8 below dp-lora and above last-layer; the distance to dp-lora shrinks as eps does.
    """

    name = "vera"
    summary = "random frozen factors that all layers share; two vectors a layer train"
    reference = "arXiv:2310.11454"
    claim = "no privacy: LoRA's results with 10 times fewer weights (arXiv:2310.11454, abstract of version 1)"
    defaults: ClassVar = {**DPLoRA.defaults, "lr": 3e-3}
    options: ClassVar = {"rank": 256, "d_initial": 0.1, "targets": "attention", "head_lr_factor": 3.0}
    ranges: ClassVar = {**DPLoRA.ranges, "d_initial": (1e-6, 1e3)}

    def _alpha(self) -> float:
        return self.settings["rank"]

    def _trains(self, name: str) -> bool:
        return "lora_" in name and name.endswith(".scale.weight")

    def _finish(self, model: nn.Module) -> None:
        import torch

        rank, layers = self.settings["rank"], _adapted(model)
        drawn = {
            "A": _kaiming(rank, max(layer.in_features for layer in layers)),
            "B": _kaiming(max(layer.out_features for layer in layers), rank),
        }
        shared: dict[tuple, nn.Parameter] = {}

        def matrix(side: str, rows: int, columns: int, like: torch.Tensor) -> nn.Parameter:
            if (side, rows, columns) not in shared:
                part = drawn[side][:rows, :columns].to(like).contiguous()
                shared[side, rows, columns] = torch.nn.Parameter(part, requires_grad=False)
            return shared[side, rows, columns]

        for layer in layers:
            base = layer.get_base_layer().weight
            a = matrix("A", rank, layer.in_features, base)
            b = matrix("B", layer.out_features, rank, base)
            layer.lora_A[ADAPTER] = scaled_layer()(a, base.new_full((rank,), self.settings["d_initial"]))
            layer.lora_B[ADAPTER] = scaled_layer()(b, base.new_zeros(layer.out_features))


def _adapted(model: nn.Module) -> list[nn.Module]:
    """The layers into which PEFT has put LoRA."""
    from peft.tuners.lora.layer import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _kaiming(rows: int, columns: int) -> torch.Tensor:
    """U(-a, a) of variance 2 / columns, from the global generator."""
    import torch

    return torch.empty(rows, columns).uniform_(-1, 1) * math.sqrt(6 / columns)

"""Layers of which LoRA's variants are made; each class is made inside a function because torch costs seconds to import."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = "default"  # PEFT's name of the only one


@cache
def scale_layer() -> type[nn.Module]:
    from torch import nn

    class Scale(nn.Module):
        """`x * weight`, coordinate by coordinate."""

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    return Scale


@cache
def scaled_layer() -> type[nn.Module]:
    from torch import nn
    from torch.nn import functional

    class Scaled(nn.Module):
        """One of VeRA's factors: a frozen matrix that other layers have too, then a vector of this layer's own."""

        def __init__(self, matrix: nn.Parameter, vector: torch.Tensor) -> None:
            super().__init__()
            self.weight, self.scale = matrix, scale_layer()(vector)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(functional.linear(x, self.weight))

    return Scaled


@cache
def magnitude_layer() -> type[nn.Module]:
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    class Magnitude(DoraLinearLayer):
        """PEFT's layer, with its lengths in a layer of their own and the product of LoRA's factors taken from their weights."""

        def __init__(self, of: DoraLinearLayer) -> None:
            super().__init__(of.fan_in_fan_out)
            self.scale = scale_layer()(of.weight)

        def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name=ADAPTER):
            """What is added to `base_result`."""
            with torch.no_grad():
                norm = self.get_weight_norm(base_layer.weight, lora_B.weight @ lora_A.weight, scaling)
            if base_layer.bias is not None:
                base_result = base_result - base_layer.bias
            return self.scale((base_result + scaling * lora_B(lora_A(x))) / norm) - base_result

    return Magnitude

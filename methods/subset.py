"""Methods that train a fixed part of the model: DP-BiTFiT (Bu et al., 2210.00036) and the last layer (2205.02973)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.methods.base import Method, freeze_all_but

if TYPE_CHECKING:
    import torch
    from torch import nn


class DPBiTFiT(Method):
    """Biases and the head train. Gradients of a bias need no activations, and lr is about ten times larger."""

    name = "dp-bitfit"
    summary = "biases and head"
    reference = "arXiv:2210.00036"
    defaults: ClassVar = {"optimizer": "adam", "lr": 1e-3, "clip_norm": 2.0}
    options: ClassVar = {"head_lr_factor": 10.0}

    def skip(self, model: nn.Module) -> str | None:
        head = set(model.head_parameters)
        if not any(n.endswith("bias") and n not in head for n, _ in model.named_parameters()):
            return "dp-bitfit needs biases and this model has none; use dp-lora."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
        freeze_all_but(model, biases | set(model.head_parameters))
        return model


class LastLayer(Method):
    """Only the head trains, on frozen features; private training of a convex problem (Mehta et al., 2205.02973)."""

    name = "last-layer"
    summary = "head only, on frozen features"
    reference = "arXiv:2205.02973"
    defaults: ClassVar = {"optimizer": "adam", "lr": 3e-2, "clip_norm": 2.0}

    def skip(self, model: nn.Module) -> str | None:
        if not model.head_parameters:
            return "last-layer trains a new head and this model has none; use dp-lora."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        freeze_all_but(model, set(model.head_parameters))
        return model

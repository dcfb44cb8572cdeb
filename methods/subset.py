"""Methods that train a fixed part of the model: DP-BiTFiT (Bu et al., 2210.00036) and the last layer (2205.02973)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.methods.base import Method, freeze_all_but

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.runs.spec import RunSpec


class DPBiTFiT(Method):
    """Biases and the head train. Gradients of a bias need no activations, and lr is about ten times larger."""

    name = "dp-bitfit"
    summary = "biases and head"
    reference = "arXiv:2210.00036"
    claim = "2 to 30 times faster and 2 to 8 times less memory than full DP tuning (arXiv:2210.00036, abstract)"
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
    """Only the head trains, on frozen features; private training of a convex problem (Mehta et al., 2205.02973).

    features: `anew` in every step, batch by batch, or `kept` for all steps, evaluations and runs of a command: the numbers are
    the same to rounding, and a step takes no longer than the head.
    """

    name = "last-layer"
    summary = "head only, on frozen features"
    reference = "arXiv:2205.02973"
    claim = "ImageNet 81.7 at eps 4 to 10, one step in full batch (arXiv:2205.02973, abstract)"
    defaults: ClassVar = {"optimizer": "adam", "lr": 3e-2, "clip_norm": 2.0}
    options: ClassVar = {"features": "anew"}
    choices: ClassVar = {"features": ("anew", "kept")}

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if self.settings["features"] == "kept" and (spec.unit == "user" or spec.views > 1):
            raise BadInput("features=kept is of single examples; leave out unit=user and views, or take features=anew.")

    def skip(self, model: nn.Module) -> str | None:
        return None if model.head_parameters else "last-layer needs a head and this model has none; use dp-lora."

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        freeze_all_but(model, set(model.head_parameters))
        return model


class NormsAndHead(Method):
    """Scales and shifts of normalisation layers train, and the head."""

    name = "norms-head"
    summary = "normalisation layers and head"
    reference = "arXiv:2503.12822"
    defaults: ClassVar = DPBiTFiT.defaults
    options: ClassVar = DPBiTFiT.options

    def skip(self, model: nn.Module) -> str | None:
        return (
            None
            if self._norms(model)
            else "norms-head needs normalisation layers and this model has none; use dp-bitfit."
        )

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        freeze_all_but(model, self._norms(model) | set(model.head_parameters))
        return model

    @staticmethod
    def _norms(model: nn.Module) -> set[str]:
        from torch import nn

        kinds = (nn.LayerNorm, nn.GroupNorm)
        norms = {p for p, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__.endswith("RMSNorm")}
        return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms}


class FirstLast(Method):
    """The first layer that has a weight (patches, a stem convolution, a table of tokens) trains, and the head."""

    name = "first-last"
    summary = "first layer and head"
    reference = "arXiv:2503.12822"
    defaults: ClassVar = DPBiTFiT.defaults
    options: ClassVar = DPBiTFiT.options

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        names = [name for name, _ in model.named_parameters()]
        first = next(name for name in names if name.endswith("weight")).rpartition(".")[0]
        freeze_all_but(model, {n for n in names if n.rpartition(".")[0] == first} | set(model.head_parameters))
        return model

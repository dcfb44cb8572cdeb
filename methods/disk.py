"""DiSK: the gradient is tracked by a simplified Kalman filter (Zhang et al., 2410.03883)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.full import DPAdam
from dpft.methods.smoothing import loss_at

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask, Loss
    from dpft.harness.runs.spec import RunSpec


class DiSK(DPAdam):
    """DP-Adam on filtered releases of a gradient that looks ahead along the last step (2410.03883, Algorithm 1).

    Example i's loss is `a f_i(w + gamma d) + (1 - a) f_i(w)` with d the last step of the weights, gamma the `lookahead`, kappa
    the `gain` and `a = (1 - kappa)/(kappa gamma)`: to first order its gradient is that at w plus (1 - kappa)/kappa times how far
    the gradient moved in the last step, which is what the filter `m <- (1 - kappa) m + kappa release` lags behind by. The mixture
    is clipped once, as one gradient, and released with noise sigma C like any other: the noise multiplier is not rescaled. d is
    a function of releases. Two forward and backward passes per step, and a copy of the weights. The filter starts at the first
    release, so that without noise and clipping it is the gradient itself wherever that is linear. gain = 1 is dp-adam.
    """

    name = "disk"
    summary = "dp-adam on Kalman-filtered releases of a look-ahead gradient"
    reference = "arXiv:2410.03883"
    options: ClassVar = {**DPAdam.options, "gain": 0.7, "lookahead": 0.5}
    ranges: ClassVar = {"gain": (1e-3, 1.0), "lookahead": (1e-3, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._filtered: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}  # the weights one step ago; empty in the first step

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(self.decoder, "disk filters releases itself")

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model

    def kind(self, step: int) -> str:
        return "first" if step == 0 and self.settings["gain"] < 1 else ""

    def step(self, ask: Ask, step: int) -> dict[str, torch.Tensor]:
        kappa = self.settings["gain"]
        (noisy,) = ask(gradient=Gradients(loss=self._mixed if self._before and kappa < 1 else None))
        updates = noisy.mean()
        if kappa == 1:
            return updates
        for name, update in updates.items():
            kept = self._filtered.get(name)
            self._filtered[name] = update.clone() if kept is None else kept.lerp_(update, kappa)
            update.copy_(self._filtered[name])
        for name, p in self._parameters.items():  # the optimizer moves p after this
            self._before[name] = p.detach().clone()
        return updates

    def _mixed(self, loss: Loss) -> Loss:
        """The mixture of the task's loss ahead and here."""
        kappa, gamma = self.settings["gain"], self.settings["lookahead"]
        share = (1 - kappa) / (kappa * gamma)

        def mixed(model: nn.Module, batch) -> torch.Tensor:
            ahead = {n: p + gamma * (p.detach() - self._before[n]) for n, p in self._parameters.items()}
            return share * loss_at(ahead, loss, model, batch) + (1 - share) * loss(model, batch)

        return mixed

    def state_dict(self) -> dict[str, torch.Tensor]:
        kept = {"filtered": self._filtered, "before": self._before}
        return {f"{label}|{name}": tensor for label, tensors in kept.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for key, tensor in state.items():
            label, name = key.split("|", 1)
            own = self._filtered if label == "filtered" else self._before
            own[name] = tensor.to(self._parameters[name].device)

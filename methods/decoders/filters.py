"""Decoders that filter or rescale releases entry by entry: DOPPLER's low-pass filter and DP-AdamBC."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.methods.decoders.base import Decoder
from dpft.methods.decoders.moments import EPSILON, Moment

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.noisy_sum import NoisySum

BELOW_ONE = 1 - 1e-9


class Doppler(Decoder):
    """A first-order low-pass filter on the releases, handed to the optimizer as the gradient (2408.13460).

    `m_t = pole m_{t-1} + b0 g_t + b1 g_{t-1}` over its gain `c_t`, the same recursion on ones, so that a constant gradient passes
    unchanged from the first step on; `b1 = delayed (1 - pole)` and b0 is the rest. With delayed = .5 the filter stops the highest
    frequency altogether; delayed = 0 is the running mean. The paper's a_1 is -pole.
    """

    name = "doppler"
    summary = "first-order low-pass filter on releases"
    reference = "arXiv:2408.13460"
    options: ClassVar = {"pole": 0.9, "delayed": 0.5}
    ranges: ClassVar = {"pole": (0.0, BELOW_ONE), "delayed": (-1.0, 0.5)}
    carries = True

    def __init__(self, options=None):
        super().__init__(options)
        self._filtered: dict[str, torch.Tensor] = {}
        self._previous: dict[str, torch.Tensor] = {}

    def decode(self, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        pole, updates = self.settings["pole"], noisy.mean()
        b1 = self.settings["delayed"] * (1 - pole)
        b0 = 1 - pole - b1
        gain = (b0 * (1 - pole ** (step + 1)) + b1 * (1 - pole**step)) / (1 - pole)
        for name, update in updates.items():
            before = self._filtered.get(name)
            filtered = update * b0 if before is None else before.to(update.device).mul_(pole).add_(update, alpha=b0)
            if b1 != 0:
                if name in self._previous:
                    filtered.add_(self._previous[name].to(update.device), alpha=b1)
                self._previous[name] = update.clone()  # in a resumed run the old one may lie elsewhere
            self._filtered[name] = filtered
            update.copy_(filtered).div_(gain)
        return updates

    def state_dict(self) -> dict[str, torch.Tensor]:
        kept = {"filtered": self._filtered, "previous": self._previous}
        return {f"{label}|{name}": tensor for label, tensors in kept.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for key, tensor in state.items():
            label, name = key.split("|", 1)
            (self._filtered if label == "filtered" else self._previous)[name] = tensor


class AdamBC(Decoder):
    """Adam whose second moment is rid of the noise's share: `mhat / sqrt(max(vhat - s^2, gamma s^2))` (2312.14334).

    s = sigma C/B is the known noise of one entry. The floor is given in units of s^2 (the paper tunes it in absolute terms),
    so that it means the same at every budget. correct = false leaves the floor alone: the control that tells the two apart.
    """

    name = "adambc"
    summary = "Adam with the noise variance taken out of the second moment"
    reference = "arXiv:2312.14334"
    options: ClassVar = {"beta": 0.9, "beta2": 0.999, "gamma": 0.1, "correct": True}
    ranges: ClassVar = {"beta": (0.0, BELOW_ONE), "beta2": (0.0, BELOW_ONE), "gamma": (1e-12, float("inf"))}
    preconditions = True

    def __init__(self, options=None):
        super().__init__(options)
        self._first = Moment("first", self.settings["beta"])
        self._second = Moment("second", self.settings["beta2"], squared=True)

    def validate(self, spec) -> None:
        super().validate(spec)
        if spec.optimizer == "sgd":
            raise BadInput("The decoder adambc is a form of Adam; set optimizer to adam or adamw.")

    def decode(self, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        updates, variance = noisy.mean(), noisy.mean_noise_std**2
        self._first.update(updates)
        self._second.update(updates)
        self.note(self._first.tensors)
        noise = variance if self.settings["correct"] else 0.0
        for name, update in updates.items():
            square = self._second.tensors[name] / self._second.correction(step + 1) - noise
            denominator = square.clamp_(min=self.settings["gamma"] * variance).sqrt_().add_(EPSILON)
            update.copy_(self._first.tensors[name]).div_(self._first.correction(step + 1)).div_(denominator)
        return updates

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._first.state_dict() | self._second.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._first.load_state_dict(state)
        self._second.load_state_dict(state)

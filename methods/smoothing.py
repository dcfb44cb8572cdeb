"""Gradients at other weights than the present ones: smoothed over random steps (DPlis), or ahead where it is steep (DP-SAT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Gradients
from dpft.methods.full import DPAdam
from dpft.methods.projection import generator as stream

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask, Loss
    from dpft.harness.query.updates import Updates

    Weights = dict[str, torch.Tensor]


class Smoothed(DPAdam):
    """DP-Adam on the mean of each example's losses at `points` other weights, clipped once; base class, not a method.

    The points are functions of the weights, of public random numbers and of releases. The first step, before there is a
    release, is dp-adam's.
    """

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model

    def kind(self, step: int) -> str:
        return "first" if step == 0 else ""

    def points(self, step: int) -> Iterator[Weights]:
        """The weights at which the loss is taken, by name, one set after the other."""
        raise NotImplementedError

    def step(self, ask: Ask, step: int) -> Updates:
        (noisy,) = ask(gradient=Gradients(loss=self._mean(step) if self._has_release() else None))
        self.learn(noisy)
        return self.decoder.decode(noisy, step)

    def learn(self, noisy) -> None:
        """Take in a release, which must be left as it is."""
        raise NotImplementedError

    def _has_release(self) -> bool:
        raise NotImplementedError

    def _mean(self, step: int) -> Callable[[Loss], Loss]:
        """From the task's loss to its mean over the points: one graph, so that one example's gradient is clipped once."""
        from torch import nn
        from torch.func import functional_call

        def smoothed(loss: Loss) -> Loss:
            class Whole(nn.Module):
                """The whole loss as a module, so that it can be called with other weights."""

                def __init__(self, model: nn.Module):
                    super().__init__()
                    self.model = model

                def forward(self, batch) -> torch.Tensor:
                    return loss(self.model, batch)

            def mean(model: nn.Module, batch) -> torch.Tensor:
                found = [
                    functional_call(Whole(model), {f"model.{name}": w for name, w in weights.items()}, (batch,))
                    for weights in self.points(step)
                ]
                return sum(found) / len(found)

            return mean

        return smoothed


class DPlis(Smoothed):
    """DP-Adam on the mean loss over `samples` random steps away from the weights (DPlis, 2103.01496).

    Example i's loss is `(1/K) sum_k f_i(w + e_k)`, e_k ~ N(0, radius^2 std^2); its gradient is clipped once and released with
    noise sigma C, whatever K is. std is what the noise of one release moves a weight by: `lr sigma C/B` under SGD, and lr
    under Adam, which makes steps of noise alone that long. The head counts with the body's lr: at its own its logits would
    be noise. The e_k are public, others in every step, the same for all examples.

    The authors' code: radius 20, K = 10 for CIFAR-10, and two things that are easy to carry over wrongly. Its lr multiplies sums,
    so that its std `lr sigma C` is `lr sigma C/B` of ours; and it clips the *sum* of the K gradients at C, so that K is also a
    smaller clip norm. Here it is the mean.
    K forward and backward passes per step, and K sets of weights and activations at once.

    Prediction: no gain over dp-adam at K times the cost.
    """

    name = "dplis"
    summary = "dp-adam on losses averaged over random steps away from the weights"
    reference = "arXiv:2103.01496"
    options: ClassVar = {**DPAdam.options, "samples": 10, "radius": 20.0}
    ranges: ClassVar = {"samples": (1, 1000), "radius": (0.0, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._noise_std = -1.0  # sigma C/B of the last release; below 0 before the first

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch

        self._seed = int(torch.randint(1 << 62, (), generator=generator))
        return super().prepare(model, generator)

    def points(self, step: int) -> Iterator[Weights]:
        import torch

        std = self.std(step)
        for k in range(int(self.settings["samples"])):
            random: dict[torch.device, torch.Generator] = {}
            moved = {}
            for name, p in self._parameters.items():
                if p.device not in random:
                    random[p.device] = stream(p.device, self._seed, step, k)
                draw = torch.randn(p.shape, generator=random[p.device], dtype=torch.float32, device=p.device)
                moved[name] = p + draw.mul_(std).to(p.dtype)
            yield moved

    def std(self, step: int) -> float:
        """Of one entry of a step away from the weights."""
        rate = self.spec.lr * self.spec.lr_factor(step)
        return self.settings["radius"] * rate * (self._noise_std if self.spec.optimizer == "sgd" else 1.0)

    def learn(self, noisy) -> None:
        self._noise_std = noisy.mean_noise_std if noisy.noise_multiplier else 0.0

    def _has_release(self) -> bool:
        return self._noise_std >= 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        import torch

        return super().state_dict() | {"noise_std": torch.tensor(self._noise_std, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._noise_std = float(state["noise_std"])
        super().load_state_dict({key: tensor for key, tensor in state.items() if key != "noise_std"})


class DPSAT(Smoothed):
    """DP-Adam on the gradient at `w + rho r/|r|` with r the last release (DP-SAT, 2306.05651).

    Sharpness-aware training looks for the gradient where the loss is largest near by. It needs a gradient to go there, which DP
    would charge a second release of the same batch for; the last release is free, and what is asked costs what dp-adam costs.
    A copy of the release is kept.

    Prediction: no effect. A release whose cosine to the gradient is .016 points where noise does, and a random direction of
    length .03 climbs by nothing.
    """

    name = "dp-sat"
    summary = "dp-adam on gradients a small way up along the last release"
    reference = "arXiv:2306.05651"
    options: ClassVar = {**DPAdam.options, "rho": 0.03}
    ranges: ClassVar = {"rho": (0.0, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._release: Weights = {}

    def points(self, step: int) -> Iterator[Weights]:
        length = sum(r.double().square().sum() for r in self._release.values()).sqrt().clamp_min(1e-30)
        yield {
            name: p + (self._release[name] * (self.settings["rho"] / length)).to(p.dtype)
            for name, p in self._parameters.items()
        }

    def learn(self, noisy) -> None:
        self._release = {name: r.clone() for name, r in noisy.tensors.items()}

    def _has_release(self) -> bool:
        return bool(self._release)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {f"release|{name}": r for name, r in self._release.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        start = "release|"
        self._release = {
            key[len(start) :]: r.to(self._parameters[key[len(start) :]].device)
            for key, r in state.items()
            if key.startswith(start)
        }
        super().load_state_dict({key: r for key, r in state.items() if not key.startswith(start)})

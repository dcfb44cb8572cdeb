"""What methods share that take gradients at other weights than the present ones: dplis, dp-sat, and disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpft.harness.query.queries import Gradients
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask, Batch, Loss
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
        self._now = step
        (noisy,) = ask(gradient=Gradients(loss=self._mean if self._has_release() else None))
        self.learn(noisy)
        return self.decoder.decode(noisy, step)

    def learn(self, noisy) -> None:
        """Take in a release, which must be left as it is."""
        raise NotImplementedError

    def _has_release(self) -> bool:
        raise NotImplementedError

    def _mean(self, loss: Loss) -> Loss:
        """The task's loss averaged over the points: one graph, so that one example's gradient is clipped once."""

        def mean(model: nn.Module, batch) -> torch.Tensor:
            found = [loss_at(weights, loss, model, batch) for weights in self.points(self._now)]
            return sum(found) / len(found)

        return mean


def loss_at(weights: Weights, loss: Loss, model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of each example [b] at other weights of `model`, by name; gradients go to what those are made of."""
    from torch import nn
    from torch.func import functional_call

    class Whole(nn.Module):
        """The whole loss as a module, so that it can be called with other weights."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            return loss(self.model, batch)

    return functional_call(Whole(), {f"model.{name}": w for name, w in weights.items()}, ())

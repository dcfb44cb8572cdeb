"""Public examples: what a method may look at as often as it wants, because nobody's privacy is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # methods are listed without torch
    import torch
    from torch import nn

    from dpft.harness.query.queries import Batch, Loss


@dataclass(frozen=True)
class Public:
    """Public examples of the run's task, encoded as its private ones are. They come from elsewhere than the training data.

    Attributes:
        examples: encoded, in a fixed order that has nothing to do with their content.
        collate: as of the task.
        loss: the task's, as the engine gets it: (model, batch) -> [b].
        device: where batches go.
    """

    examples: Sequence[dict[str, Any]]
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]
    loss: Loss
    device: torch.device

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, size: int, number: int = 0) -> Batch:
        """The `number`-th batch of `size` examples; after the last example the first ones come again."""
        chosen = [self.examples[(number * size + i) % len(self.examples)] for i in range(size)]
        from dpft.harness import padding

        return padding.sent(self.collate(chosen), self.device)

    def mean_loss(self, model: nn.Module, batch: Batch) -> float:
        """Of a public batch, at the present weights, in evaluation mode: no dropout, so no randomness is used up."""
        import torch

        with evaluating(model), torch.no_grad():
            return float(self.loss(model, batch).double().mean())

    def gradient(self, model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch) -> dict[str, torch.Tensor]:
        """Of the mean loss of a public batch, by name; zero where the loss does not reach a parameter."""
        import torch

        losses = self.loss(model, batch)
        found = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if gradient is None else gradient
            for (name, p), gradient in zip(parameters.items(), found, strict=True)
        }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""The slow engine everything is checked against: one autograd call per example."""

import torch

from dpft.harness.engine.base import Engine, clip_factors, unused
from dpft.harness.engine.encoding import IDENTITY


class ReferenceEngine(Engine):
    """Runs every example on its own through autograd; supports every model, and is as slow as that sounds."""

    name = "reference"

    def accumulate(self, batch, total, clip_norm, encodings):
        losses, norms = [], []
        for i in range(len(next(iter(batch.values())))):
            loss, gradient = self.per_example({key: value[i : i + 1] for key, value in batch.items()}, encodings)
            with self.clock("clip"):
                squares = [g.double().square().sum() for g in gradient.values()]
                norm = torch.stack(squares).sum().sqrt()
                factor = clip_factors(norm, clip_norm)
                for name, g in gradient.items():
                    total[name].add_(g * factor.to(g.dtype))
            losses.append(loss)
            norms.append(norm)
        return torch.stack(losses), torch.stack(norms)

    def per_example(self, example, encodings):
        """(loss, encoded gradients by name) of a batch that holds one example."""
        with self.clock("forward"):
            loss = self.losses(example)[0]
        with self.clock("backward"):
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        encoded = {}
        for (name, _), gradient in zip(self.parameters.items(), gradients, strict=True):
            if gradient is None:
                raise unused(name)
            encoded[name] = encodings.get(name, IDENTITY).dense(gradient[None])[0]
        return loss.detach(), encoded

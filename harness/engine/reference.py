"""The slow engine everything is checked against: one autograd call per example."""

import torch

from dpft.harness.engine.base import Engine, example_gradient


class ReferenceEngine(Engine):
    """Runs every example on its own through autograd; supports every model, and is as slow as that sounds."""

    name = "reference"
    batched = False

    def accumulate(self, batch, total, bound, encodings):
        losses, norms = [], []
        for i in range(len(next(iter(batch.values())))):
            loss, gradient = example_gradient(self, {k: v[i : i + 1] for k, v in batch.items()}, encodings)
            with self.clock("clip"):
                squares = {name: g.double().square().sum()[None] for name, g in gradient.items()}
                factors, norm = self.clip(squares, bound)
                for name, g in gradient.items():
                    total[name].add_(g * factors[name][0].to(g.dtype))
            losses.append(loss)
            norms.append(norm[0])
        return torch.stack(losses), torch.stack(norms)

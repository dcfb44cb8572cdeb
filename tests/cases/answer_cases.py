"""A model of two matrices whose per-example gradient is its input, and what answers questions about it."""

from contextlib import nullcontext

import torch
from torch import nn

from dpft.harness.engine import engine_class
from dpft.harness.engine.clipping import Clipping
from dpft.harness.train.answer import Answers
from dpft.harness.train.core import Core
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.methods.clipping.base import ClippingRule


class Linear(nn.Module):
    """x @ first + y @ second, [b]; of an example the gradients are x [4] and y [3]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 1, bias=False), nn.Linear(3, 1, bias=False)
        self.modes = []

    def forward(self, x, y):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return (self.first(x) + self.second(y))[:, 0]


def loss(model, batch):
    return model(batch["x"], batch["y"])


def batch_of(count, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (scale * torch.randn(count, size, generator=generator) for size in (4, 3))
    return {"x": x, "y": y, "number": torch.arange(count)}


def gradient_norms(batch):
    """[b, 2]: of the two matrices."""
    return torch.stack([batch["x"].double().norm(dim=1), batch["y"].double().norm(dim=1)], 1)


class Bench:
    """A core, and the answers of one step on `batches`, in the order of what happened: `booked`, `drawn`.

    sigma 0: what is released is the clipped sum itself.
    """

    def __init__(self, batches, clip_norm=1.0, groups="flat", sigma=0.0, rule=None, engine="factored"):
        self.happened = []
        self.model, self.batches = Linear(), batches
        parameters = dict(self.model.named_parameters())
        noise = source("cpu", "bench")
        add = noise.add
        noise.add = lambda *arguments: (self.happened.append("drawn"), add(*arguments))
        made = engine_class(engine)(self.model, loss, parameters, lambda phase: nullcontext(), Clipping(groups=groups))
        self.core = Core(
            self.model,
            parameters,
            made,
            GaussianMechanism(sigma, clip_norm, 1, noise),
            rule or ClippingRule(),
            clip_norm,
            lambda phase: nullcontext(),
        )

    def answers(self, *declared, watcher=None, **shares):
        shares = shares or dict.fromkeys(declared or ("gradient",), 1.0)
        return Answers(self.core, shares, lambda: iter(self.batches), lambda: self.happened.append("booked"), watcher)

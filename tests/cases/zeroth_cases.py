"""dp-zo on small models by the code that answers a run's questions, with noise of our choice."""

import torch
from torch import nn

from dpft.harness.engine.base import ForwardEngine
from dpft.harness.probes import Clock
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train.answer import Answers
from dpft.harness.train.core import Core
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.methods.random_directions import Directions


def method_for(model, seed=0, clip_norm=1e9, name="dp-zo", public=None, **options):
    """The method, prepared for `model`; without a limit to what counts as an outlier."""
    method = registry.instance(resolve({"task": "sst2", "method": name, "clip_norm": clip_norm, **options}))
    method.public = public
    model.head_parameters = getattr(model, "head_parameters", [])
    method.prepare(model, torch.Generator().manual_seed(seed))
    return method


class Listening:
    """`ask` of one step; keeps the release and the questions."""

    def __init__(self, model, method, loss, batches, sigma=0.0, batch_size=1, noise=0):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        clock, bound = Clock(torch.device("cpu")), method.spec.clip_norm
        engine = ForwardEngine(model, loss, parameters, clock)
        mechanism = GaussianMechanism(sigma, bound, batch_size, source("cpu", noise))
        core = Core(model, parameters, engine, mechanism, method.rule, bound, clock)
        self._answers = Answers(core, method.releases(0), lambda: batches)

    def __call__(self, **queries):
        self.queries = queries
        self.released = self._answers(**queries)
        return self.released


def step(model, method, loss, batches, number=0, **more):
    """(the step's updates, its released numbers)."""
    ask = Listening(model, method, loss, batches, **more)
    updates = method.step(ask, number)
    return updates, ask.released[0].values


def whole(method, number, k, p, which=0):
    """z_k of one parameter."""
    return Directions(method._seed, number).moved(k, which, torch.zeros_like(p), 1.0)


class Slopes(nn.Module):
    """One weight vector; the loss of an example is its product with it, and so the example is its gradient."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype))

    def forward(self, x):
        return x @ self.weight


def linear(model, batch):
    return model(batch["x"])

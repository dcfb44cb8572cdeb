"""Clipping rules without a run: one told what a run tells it, fed with norms."""

import math

import torch

from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.query.queries import Gradients, Seen
from dpft.harness.runs import registry, resolve

B, SIGMA = 256, 0.7


class FakePublic:
    """Public examples whose losses are handed out one after the other; the last one stays."""

    def __init__(self, losses=(1.0,)):
        self.losses, self.looks = list(losses), 0

    def __len__(self):
        return 100

    def batch(self, size, number=0):
        return {"size": torch.tensor(size)}

    def mean_loss(self, model, batch):
        self.looks += 1
        return self.losses[min(self.looks, len(self.losses)) - 1]


def resolved(**more):
    return resolve.resolve({"task": "sst2", "method": "dp-adam", "batch_size": B, **more})


def started(name, sigma=SIGMA, groups=None, public=None, **more):
    """The rule of a run, started; without groups there is one."""
    layers = {"clip_groups": "layer"} if name == "per-layer" else {}
    found = resolved(clipping=name, **{**layers, **more})
    rule = registry.make(found.method, found.decoder, found.options, found.clipping).rule
    if rule.needs_public:
        rule.public = public or FakePublic()
    rule.start(found, sigma, groups or {"": ["w"]})
    return rule


def ball(bound):
    return math.hypot(*bound.values()) if isinstance(bound, dict) else bound


def seen(lengths, bound):
    """Of gradients of these norms [b, groups], clipped by abadi group by group."""
    lengths = torch.as_tensor(lengths, dtype=torch.float64)
    limits = list(bound.values()) if isinstance(bound, dict) else [bound / lengths.shape[1] ** 0.5] * lengths.shape[1]
    clipped = lengths.minimum(lengths.new_tensor(limits)).square().sum(1).sqrt()
    return Seen(None, {}, lambda: None, lengths, clipped)


def answer(tensor, clip_norm, sigma, batch=B, share=1.0):
    """Rows [b, size] summed and released as `harness/train/answer.py` does."""
    multiplier = sigma / math.sqrt(share)
    noise = multiplier * clip_norm * torch.randn(tensor.shape[1], dtype=torch.float64)
    return (tensor.sum(0) + noise) / batch, multiplier


def step(rule, norms, sigma=SIGMA, batch=B, coordinates=0):
    """One step of a run whose examples' gradients have these norms [b, groups], and so many coordinates."""
    gradient, more = rule.amend(Gradients())
    looked, bound, shares = seen(norms, gradient.bound), ball(gradient.bound), rule.shares()
    values = None
    if gradient.beside is not None:
        rows = gradient.beside.of(looked)
        assert rows.shape == (len(norms), gradient.beside.size)
        assert bool((looked.clipped**2 + rows.square().sum(1) <= bound**2 * (1 + 1e-9)).all())
        values = answer(rows, bound, sigma, batch)[0]
    answers = {}
    for name, query in more.items():
        rows = query.of(looked)
        assert rows.shape == (len(norms), query.size) and bool((rows.norm(dim=1) <= query.bound * (1 + 1e-12)).all())
        mean, multiplier = answer(rows, query.bound, sigma, batch, shares[name])
        answers[name] = NoisySum({VALUES: mean}, multiplier, query.bound, batch)
    multiplier = sigma / math.sqrt(1 - sum(shares.values()))
    rule.learn(NoisySum({"w": torch.zeros(coordinates)}, multiplier, bound, batch, values), answers)


def sampled(scale, generator, population=4000, spread=0.5):
    """Norms [b, 1] of a Poisson batch from a log-normal population with median `scale`."""
    size = int(torch.binomial(torch.tensor(float(population)), torch.tensor(B / population), generator=generator))
    return scale * torch.exp(spread * torch.randn(size, 1, dtype=torch.float64, generator=generator))


def run(rule, scale, steps, generator=None, **more):
    """C after each step."""
    generator = generator or torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    trace = []
    for _ in range(steps):
        step(rule, sampled(scale, generator), **more)
        trace.append(rule.clip_norm)
    return trace

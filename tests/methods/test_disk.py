"""DiSK's query and filter: what it asks for, and what it makes of it where the answer is known."""

import copy

import pytest
import torch
from asking import answered, first
from small_runs import silent
from torch import nn

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput
from dpft.harness.probes import Clock
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(1)


class Small(nn.Module):
    def __init__(self, nonlinear):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5) if nonlinear else nn.Identity(), nn.Linear(5, 2))
        self.act = nn.Tanh() if nonlinear else nn.Identity()

    def forward(self, x):
        return self.act(self.body(x))


def made(nonlinear=True, **options):
    torch.manual_seed(0)
    model = Small(nonlinear).double()
    method = registry.make("disk", "mean", options)
    method.prepare(model, torch.Generator())
    batch = {"x": torch.randn(7, 6).double(), "y": torch.randn(7, 2).double()}
    return model, method, batch


def engine_of(name, model):
    return engine_class(name)(model, squared_error, dict(model.named_parameters()), Clock(torch.device("cpu")))


def summed(engine, question, batch, clip_norm=1e9):
    """The clipped sum that answers a question for gradients."""
    total = zero_sums(engine.parameters, {})
    with engine.under(question.loss):
        engine.accumulate(batch, total, clip_norm, {})
    return total


def begun(gain, lookahead):
    """A method that has moved once, and what it asks in its second step."""
    model, method, batch = made(gain=gain, lookahead=lookahead)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = answered(method, 0, silent(1).release({name: torch.randn_like(p) for name, p in before.items()}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(0.1 * update[name])
    return model, before, batch, first(method, 1)["gradient"]


def gradient(model, batch):
    return torch.autograd.grad(squared_error(model, batch).sum(), list(model.parameters()))


def test_one_example_is_asked_for_the_mixture_of_both_points_and_clipped_once():
    model, before, batch, question = begun(gain=0.6, lookahead=0.25)
    a = 0.4 / (0.6 * 0.25)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(0.25 * (p - before[name]))
    for clip_norm in (1e9, 0.3):
        expected = 0.0
        for i in range(7):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            pairs = zip(gradient(moved, one), gradient(model, one), strict=True)
            flat = torch.cat([(a * there + (1 - a) * here).flatten() for there, here in pairs])
            expected = expected + flat * min(1.0, clip_norm / float(flat.norm()))
        for name in ("factored", "reference"):
            engine = engine_of(name, model)
            found = torch.cat([t.flatten() for t in summed(engine, question, batch, clip_norm).values()])
            engine.close()
            assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_the_first_step_asks_for_the_plain_gradient():
    model, method, batch = made()
    question = first(method, 0)["gradient"]
    assert question.loss is None
    total = summed(engine_of("factored", model), question, batch)
    for found, expected in zip(total.values(), gradient(model, batch), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_where_the_gradient_is_linear_the_filter_is_the_gradient_and_without_looking_ahead_it_lags():
    """On a quadratic loss of one layer, without noise and clipping, at every step of a real descent."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    method = registry.make("disk", "mean", {})
    method.prepare(model, torch.Generator())
    batch = {"x": torch.randn(20, 4).double(), "y": torch.randn(20, 1).double()}
    engine, mechanism = engine_of("factored", model), silent(1)
    lagging = 0.0
    for step in range(6):
        total = summed(engine, first(method, step)["gradient"], batch)
        update = answered(method, step, mechanism.release(total))["weight"]
        (exact,) = gradient(model, batch)
        lagging = exact if step == 0 else 0.3 * lagging + 0.7 * exact
        assert torch.allclose(update, exact, rtol=1e-9, atol=1e-9)
        assert step == 0 or (lagging - exact).norm() > 1e-2 * exact.norm()
        with torch.no_grad():
            model.weight.sub_(0.01 * update)


def test_disk_takes_no_second_filter():
    with pytest.raises(BadInput, match="filters releases itself"):
        resolve({"task": "sentences", "method": "disk", "decoder": "doppler"})
    with pytest.raises(BadInput, match="gain must be"):
        resolve({"task": "sentences", "method": "disk", "gain": 0.0})

"""What changes a layer without changing its type: the factored engine is right about it, or refuses it by name."""

import contextlib
import copy

import pytest
import torch
from net_cases import WIDTH, Function, batch_of, linear, loss, net_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import CannotRun

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]


def sums_of(name, model, batch, clip_norm=0.05):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    try:
        total = zero_sums(parameters, {})
        engine.accumulate(
            {k: v[:1] for k, v in batch.items()}, total, clip_norm, {}
        )  # of one example nothing is compared
        engine.agreed = True  # what is refused here is refused before anything is compared
        engine.accumulate(batch, total, clip_norm, {})
        return total
    finally:
        engine.close()


def middle(build):
    """Builds the module under test in float64 inside a net."""
    return net_of(build)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class WithGain(nn.Linear):
    """A Linear by type that `__init__` gave one parameter more, which a hook multiplies in."""


def with_gain():
    layer = linear()
    layer.gain = nn.Parameter(torch.full((WIDTH,), 1.5))
    layer.register_forward_hook(lambda module, args, output: output * module.gain)
    return layer


def table_with_scale():
    class Scaled(nn.Embedding):
        def __init__(self):
            super().__init__(9, WIDTH)
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, ids):
            return super().forward(ids) * self.scale

    table = Scaled()
    return Function(lambda self, x: x + self.table((x[..., 0] > 0).long()), table=table)


def pruned():
    layer = linear()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


def pruned_convolution():
    conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    prune.random_unstructured(conv, "weight", amount=0.5)
    return Function(lambda self, x: self.conv(x.mT).mT, conv=conv)


def parametrised():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def with_hook(method, function):
    layer = linear()
    getattr(layer, method)(function)
    return layer


def parameter_hook():
    layer = linear()
    layer.weight.register_hook(lambda gradient: gradient * 2)
    return layer


def raw_with_pre_hook():
    module = Function(lambda self, x: x * self.scale, scale=nn.Parameter(torch.ones(WIDTH)))
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return module


REFUSED = {
    "pruned": (pruned, r"Layer middle \(Linear\) makes its weight anew in a hook"),
    "pruned-convolution": (pruned_convolution, r"Layer middle.conv \(Conv1d\) makes its weight anew"),
    "weight-norm": (lambda: nn.utils.weight_norm(linear()), r"Layer middle \(Linear\) makes its weight anew"),
    "spectral-norm": (lambda: nn.utils.spectral_norm(linear()), r"Layer middle \(Linear\) makes its weight anew"),
    "parametrised": (parametrised, "Layer middle is parametrised"),
    "parametrised-by-torch": (lambda: parametrizations.orthogonal(linear()), "Layer middle is parametrised"),
    "a-parameter-more": (with_gain, r"Layer middle \(Linear\) holds a parameter gain"),
    "a-parameter-more-in-a-table": (table_with_scale, r"middle.table \(Scaled\) holds a parameter scale"),
    "backward-hook": (
        lambda: with_hook("register_full_backward_hook", lambda m, gi, go: tuple(g * 2 for g in gi)),
        r"Layer middle \(Linear\) has a backward hook",
    ),
    "backward-pre-hook": (
        lambda: with_hook("register_full_backward_pre_hook", lambda m, go: tuple(g * 2 for g in go)),
        r"Layer middle \(Linear\) has a backward hook",
    ),
    "parameter-hook": (parameter_hook, "middle.weight has a hook on its gradient"),
    "pre-hook-of-a-raw-parameter": (raw_with_pre_hook, r"Layer middle \(Function\) has a forward pre-hook"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_type_does_not_tell_is_refused_by_name(name):
    build, message = REFUSED[name]
    with pytest.raises(CannotRun, match=message):
        sums_of("factored", middle(build), batch_of(3, 5))


def own_forward():
    layer = linear()
    layer.forward = lambda x: F.linear(x, layer.weight * layer.weight, layer.bias)
    return layer


class Standardised(nn.Conv1d):
    """Weight standardisation: a convolution by type, not by what it computes."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Masked(nn.Module):
    """A raw parameter and a mask [T, T] that has a row for every token, not for every example."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x, mask):
        return torch.softmax(x @ x.mT * self.scale.sum() + mask, -1) @ (x * self.scale)


def masked(leading):
    def forward(self, x):
        length = x.shape[1]
        mask = torch.full((length, length), -1e9, dtype=x.dtype).triu(1)
        return self.inner(x, mask[None].expand(len(x), -1, -1) if leading else mask)

    return Function(forward, inner=Masked())


RIGHT = {
    "doubled-by-a-hook": lambda: with_hook("register_forward_hook", lambda m, args, output: output * 2),
    "changed-in-place-by-a-hook": lambda: with_hook("register_forward_hook", lambda m, args, output: output.mul_(2)),
    "squared-by-a-hook-of-the-call": lambda: with_hook(
        "register_forward_hook", lambda m, args, output: output.square()
    ),
    "doubled-by-a-pre-hook": lambda: with_hook("register_forward_pre_hook", lambda m, args: (args[0] * 2,)),
    "raw-parameter-and-a-hook": lambda: hooked_raw(),
    "standardised-convolution": lambda: Function(
        lambda self, x: self.conv(x.mT).mT, conv=Standardised(WIDTH, WIDTH, 3, padding=1)
    ),
    "forward-of-the-instance": own_forward,
    "one-mask-for-each-example": lambda: masked(True),
    "group-norm-of-vectors": lambda: Function(
        lambda self, x: x + self.norm(x.mean(1))[:, None], norm=nn.GroupNorm(2, WIDTH)
    ),
}


def hooked_raw():
    module = Function(lambda self, x: x * self.scale, scale=nn.Parameter(torch.ones(WIDTH)))
    module.register_forward_hook(lambda module, args, output: output * 3)
    return module


@pytest.mark.parametrize("size, length", [(3, 5), (4, 4)])
@pytest.mark.parametrize("name", RIGHT)
def test_what_the_engine_sees_through_is_exact(name, size, length):
    model, batch = middle(RIGHT[name]), batch_of(size, length)
    expected, found = (sums_of(engine, model, batch) for engine in ("reference", "factored"))
    for parameter, value in expected.items():
        assert float((found[parameter] - value).norm()) <= 1e-10 * max(float(value.norm()), 1e-4), parameter


@pytest.mark.parametrize("size, length", [(3, 5), (4, 4)])
def test_a_mask_that_is_as_long_as_the_batch_is_not_taken_for_one_row_per_example(size, length):
    model, batch = middle(lambda: masked(False)), batch_of(size, length)
    expected, found = (sums_of(engine, model, batch) for engine in ("reference", "factored"))
    assert all(torch.allclose(found[n], value, rtol=1e-10, atol=1e-13) for n, value in expected.items())


def test_a_hook_that_appears_later_is_seen_through():
    """Registered behind the engine's own, and after its first pass."""
    model, batch = middle(linear), batch_of(3, 5)
    parameters = dict(model.named_parameters())
    engine = engine_class("factored")(model, loss, parameters, lambda phase: contextlib.nullcontext())
    engine.accumulate(batch, zero_sums(parameters, {}), 0.05, {})
    model.middle.register_forward_hook(lambda module, args, output: output * 2)
    found = zero_sums(parameters, {})
    engine.accumulate(batch, found, 0.05, {})
    engine.close()
    expected = sums_of_all("reference", copy.deepcopy(model), batch)
    assert all(torch.allclose(found[n], value, rtol=1e-10, atol=1e-13) for n, value in expected.items())


def sums_of_all(name, model, batch):
    parameters = dict(model.named_parameters())
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    total = zero_sums(parameters, {})
    engine.accumulate(batch, total, 0.05, {})
    return total

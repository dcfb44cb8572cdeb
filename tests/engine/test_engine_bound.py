"""The clipping bound in fp32 where the per-token gradients nearly cancel: what one example adds has norm at most C."""

import contextlib
import math

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums

WIDTH, MISMATCH = 64, 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")


class Twice(nn.Module):
    """One layer used twice; the second use nearly undoes the gradient of the first."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) - (1 + MISMATCH) * self.layer(x)


class Tied(nn.Module):
    """A table whose gradient as output layer nearly undoes its gradient as embedding; `x` holds every token once."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out.weight = self.table.weight
        self.hidden = nn.Buffer(torch.randn(WIDTH))

    def forward(self, x):
        """The gradient of row v is `hidden` by the lookup of v, and -(1 + MISMATCH) `hidden` by logit v."""
        looked_up = (self.table(x) * self.hidden).sum(2)
        return looked_up - (1 + MISMATCH) * self.out(self.hidden.expand(len(x), 3, -1)).mean(1)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return x * self.scale


# layer, and whether its tokens are the last but one dimension (True) or the last one (False) of its inputs
LAYERS = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), True),
    "linear-without-bias": (lambda: nn.Linear(WIDTH, WIDTH, bias=False), True),
    "linear-used-twice": (lambda: Twice(nn.Linear(WIDTH, WIDTH)), True),
    "narrow-linear": (lambda: nn.Linear(WIDTH, 2), True),
    "hf-conv1d": (lambda: Conv1D(WIDTH, WIDTH), True),
    "layer-norm": (lambda: nn.LayerNorm(WIDTH), True),
    "rms-norm": (lambda: LlamaRMSNorm(WIDTH), True),
    "raw-vector": (Scale, True),
    "embedding": (lambda: nn.Embedding(11, WIDTH), True),
    "embedding-used-twice": (lambda: Twice(nn.Embedding(11, WIDTH)), True),
    "conv1d": (lambda: nn.Conv1d(WIDTH, WIDTH, 1), False),
}


def alternating(length):
    return torch.where(torch.arange(length) % 2 == 0, 1.0, -(1 + MISMATCH))


def cancelling_batch(model, length, tokens_before_channels, size):
    """Equal inputs, output gradients +e, -e(1 + MISMATCH), ...; the gradients of all but the first example are zero."""
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        x = torch.full((size, length), 3)
    else:
        x = torch.randn(WIDTH).expand(size, length, WIDTH)
        x = x if tokens_before_channels else x.transpose(1, 2)
    x = x.contiguous()
    signs = torch.ones(length) if isinstance(model, Twice) else alternating(length)  # two uses cancel by themselves
    out = model(x).shape
    gradient = torch.randn(out[-1] if tokens_before_channels else out[1])[None] * signs[:, None]
    weight = torch.zeros(out)
    weight[0] = gradient if tokens_before_channels else gradient.T
    return {"x": x, "weight": weight}


def tied_batch(size):
    weight = torch.zeros(size, WIDTH)
    weight[0] = torch.randn(WIDTH)
    return {"x": torch.arange(WIDTH).repeat(size, 1), "weight": weight}


def loss(model, batch):
    return (model(batch["x"]) * batch["weight"]).flatten(1).sum(1)


def clipped_norm(name, model, batch, clip_norm):
    """Norm, computed in float64, of the sum to which only one example contributes."""
    parameters = dict(model.named_parameters())
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    total = zero_sums(parameters, {})
    try:
        engine.accumulate(batch, total, clip_norm, {})
    finally:
        engine.close()
    return math.sqrt(sum(float(value.double().square().sum()) for value in total.values()))


def check(model, batch):
    norm = clipped_norm("reference", model, batch, math.inf)
    assert norm > 0
    for clip_norm in (0.3 * norm, 0.9 * norm):
        assert clipped_norm("reference", model, batch, clip_norm) <= clip_norm * (1 + 1e-6)
        found = clipped_norm("factored", model, batch, clip_norm)
        assert found <= clip_norm * (1 + 1e-6)
        assert found >= clip_norm * 0.95, "clipped to much less than the bound"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("length", [16, 32, 512])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_that_cancel_over_the_tokens(name, length, size):
    torch.manual_seed(0)
    build, tokens_before_channels = LAYERS[name]
    model = build()
    check(model, cancelling_batch(model, length, tokens_before_channels, size))


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_of_a_tied_table_that_cancel(size):
    torch.manual_seed(0)
    model = Tied()
    check(model, tied_batch(size))


@pytest.mark.parametrize("size", [1, 3])
def test_a_long_wide_linear(size):
    """So wide that the grams of 256 tokens are cheaper than the gradient."""
    torch.manual_seed(0)
    model = nn.Linear(640, 640)
    weight = torch.zeros(size, 256, 640)
    weight[0] = torch.randn(640) * alternating(256)[:, None]
    check(model, {"x": torch.randn(640).repeat(size, 256, 1), "weight": weight})

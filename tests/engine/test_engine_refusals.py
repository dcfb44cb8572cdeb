"""Models whose examples cannot be told apart are refused; models off the beaten track are right or refused, never wrong."""

import contextlib

import pytest
import torch
from net_cases import WIDTH, Function, batch_of, linear, loss, net_of
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput, CannotRun

SHAPES = {"3x5": (3, 5), "4x4": (4, 4)}  # batch x length; in the second every size is 4


def raw(*shape):
    return nn.Parameter(torch.randn(shape))


def batch_norm(**options):
    return Function(lambda self, x: self.norm(x.mT).mT, norm=nn.BatchNorm1d(WIDTH, **options))


def flat(function):
    """`function` on [b * t, WIDTH]."""
    return lambda self, x: function(self, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def attention_over_the_batch(self, x):
    weights = torch.softmax(self.query(x).transpose(0, 1) @ x.permute(1, 2, 0), -1)
    return (weights @ x.transpose(0, 1)).transpose(0, 1)


class BatchStatistics(nn.Module):
    """A batch normalisation that is not torch's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = raw(WIDTH), raw(WIDTH)

    def forward(self, x):
        return self.weight * (x - x.mean((0, 1))) / (x.var((0, 1), correction=0) + 1e-3).sqrt() + self.bias


# Modules with which the gradient of one example's loss depends on the other examples: there is nothing to be right about.
MIXING = {
    "batch-norm": batch_norm,
    "batch-norm-without-parameters": lambda: batch_norm(affine=False),
    "frozen-batch-norm": lambda: batch_norm().requires_grad_(False),
    "own-batch-norm": BatchStatistics,
    "batch-mean-subtracted": lambda: Function(lambda self, x: x - x.mean(0)),
    "batch-mean-subtracted-behind-a-layer": lambda: Function(
        lambda self, x: self.layer(x) - self.layer(x).mean(0, keepdim=True), layer=linear()
    ),
    "batch-mean-before-a-layer": lambda: Function(
        lambda self, x: self.layer(x - x.mean(0, keepdim=True)), layer=linear()
    ),
    "attention-over-the-batch": lambda: Function(attention_over_the_batch, query=linear()),
    "neighbour-added": lambda: Function(lambda self, x: x + self.layer(x).roll(1, 0), layer=linear()),
    "softmax-over-the-batch": lambda: Function(lambda self, x: torch.softmax(self.layer(x), 0), layer=linear()),
}


class SubLinear(nn.Linear):
    """A Linear by type, not by what it computes."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.5 + self.weight.square(), self.bias)


def positions(ids):
    return lambda self, x: x + self.position(ids(x))


def with_hook(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return layer


def tied_by_function():
    layer = linear()
    return Function(lambda self, x: F.linear(torch.tanh(self.layer(x)), self.layer.weight.mT), layer=layer)


def shared_across_kinds():
    first, second = linear(), Conv1D(WIDTH, WIDTH)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


# Modules that keep the examples apart, in ways that a rule by layer type could get wrong.
UNUSUAL = {
    "positions-without-leading-dimension": lambda: Function(
        positions(lambda x: torch.arange(x.shape[1])), position=nn.Embedding(8, WIDTH)
    ),
    "positions-with-leading-dimension-1": lambda: Function(
        positions(lambda x: torch.arange(x.shape[1])[None]), position=nn.Embedding(8, WIDTH)
    ),
    "positions-of-every-row": lambda: Function(
        positions(lambda x: torch.arange(x.shape[1]).expand(x.shape[:2])), position=nn.Embedding(8, WIDTH)
    ),
    "one-row-for-all": lambda: Function(
        lambda self, x: x * self.layer(torch.ones(1, WIDTH, dtype=x.dtype)), layer=linear()
    ),
    "rows-that-are-no-examples": lambda: Function(
        lambda self, x: x @ self.layer(torch.eye(WIDTH, dtype=x.dtype)), layer=linear()
    ),
    "flattened-linear": lambda: Function(flat(lambda self, x: self.layer(x)), layer=linear()),
    "flattened-layer-norm": lambda: Function(flat(lambda self, x: self.layer(x)), layer=nn.LayerNorm(WIDTH)),
    "sequence-first": lambda: Function(lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1), layer=linear()),
    "sequence-first-norm": lambda: Function(
        lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1), layer=nn.LayerNorm(WIDTH)
    ),
    "one-token-at-a-time": lambda: Function(
        lambda self, x: torch.stack([self.layer(x[:, i]) for i in range(x.shape[1])], 1), layer=linear()
    ),
    "one-example-at-a-time": lambda: Function(
        lambda self, x: torch.cat([self.layer(x[i : i + 1]) for i in range(len(x))]), layer=linear()
    ),
    "batch-in-two-halves": lambda: Function(
        lambda self, x: torch.cat([self.layer(x[:2]), self.layer(x[2:])]), layer=linear()
    ),
    "reversed-batch": lambda: Function(lambda self, x: self.layer(x.flip(0)).flip(0), layer=linear()),
    "raw-matrix": lambda: Function(lambda self, x: x @ self.weight, weight=raw(WIDTH, WIDTH)),
    "raw-matrix-over-tokens": lambda: Function(
        lambda self, x: self.weight[: x.shape[1], : x.shape[1]] @ x, weight=raw(8, 8)
    ),
    "raw-matrix-and-broadcast": lambda: Function(
        lambda self, x: x @ torch.diag(self.weight) + self.weight, weight=raw(WIDTH)
    ),
    "raw-vector-through-softmax": lambda: Function(
        lambda self, x: x * torch.softmax(self.weight, 0) * self.weight.norm(), weight=raw(WIDTH)
    ),
    "raw-vector-in-a-norm": lambda: Function(lambda self, x: F.layer_norm(x, (WIDTH,), self.weight), weight=raw(WIDTH)),
    "subclass-of-linear": lambda: SubLinear(WIDTH, WIDTH),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "weight-used-without-its-layer": tied_by_function,
    "multi-head-attention": lambda: Function(
        lambda self, x: self.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    ),
    "transformer-layer-sequence-first": lambda: Function(
        lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1),
        layer=nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0),
    ),
    "lstm": lambda: Function(lambda self, x: self.lstm(x)[0], lstm=nn.LSTM(WIDTH, WIDTH, batch_first=True)),
    "keyword-argument": lambda: Function(lambda self, x: self.layer(input=x), layer=linear()),
    "output-changed-in-place": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True)),
    "forward-hook": lambda: with_hook(linear()),
    "forward-pre-hook": lambda: with_pre_hook(linear()),
    "weight-shared-by-linear-and-conv1d": shared_across_kinds,
    "used-again-without-gradient": lambda: Function(
        lambda self, x: self.layer(x) + self.layer(x).detach(), layer=linear()
    ),
    "second-use-is-not-needed": lambda: Function(lambda self, x: (self.layer(x * 2), self.layer(x))[1], layer=linear()),
    "circular-padding": lambda: Function(
        lambda self, x: self.conv(x.mT).mT, conv=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")
    ),
    "transposed-convolution": lambda: Function(
        lambda self, x: self.conv(x.mT).mT, conv=nn.ConvTranspose1d(WIDTH, WIDTH, 3)
    ),
    "batch-norm-in-evaluation-mode": lambda: batch_norm().eval(),
    "frozen-batch-norm-in-evaluation-mode": lambda: batch_norm().requires_grad_(False).eval(),
    "instance-norm": lambda: Function(lambda self, x: self.norm(x.mT).mT, norm=nn.InstanceNorm1d(WIDTH, affine=True)),
    "bilinear": lambda: Function(lambda self, x: self.layer(x, x), layer=nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    "prelu": lambda: nn.PReLU(),
    "embedding-bag": lambda: Function(
        lambda self, x: x + self.bag((x > 0).long().flatten(0, 1)).unflatten(0, x.shape[:2]),
        bag=nn.EmbeddingBag(2, WIDTH),
    ),
    "embedding-by-frequency": lambda: Function(
        lambda self, x: x + self.embed((x[..., 0] > 0).long()),
        embed=nn.Embedding(2, WIDTH, scale_grad_by_freq=True),
    ),
}


def clipped(name, model, batch, clip_norm, loss=loss):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    try:
        total = zero_sums(parameters, {})
        return total, engine.accumulate(batch, total, clip_norm, {})[1]
    finally:
        engine.close()


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", MIXING)
def test_modules_that_mix_examples_are_refused(name, size, length):
    model = net_of(MIXING[name])
    with pytest.raises(CannotRun):
        clipped("factored", model, batch_of(size, length), 0.1)


@pytest.mark.parametrize(
    "name, layer", [("batch-norm", "norm"), ("flattened-linear", "layer"), ("one-row-for-all", "layer")]
)
def test_the_message_names_the_layer_where_its_kind_or_its_rows_tell(name, layer):
    model = net_of({**MIXING, **UNUSUAL}[name])
    with pytest.raises(CannotRun, match=rf"middle\.{layer}"):
        clipped("factored", model, batch_of(3, 5), 0.1)


def test_a_loss_that_mixes_examples_is_refused():
    def centred(model, batch):
        losses = loss(model, batch)
        return losses - losses.mean() / 2

    with pytest.raises(CannotRun):
        clipped("factored", net_of(linear), batch_of(3, 5), 0.1, centred)


def test_mixing_is_noticed_behind_a_batch_of_one_example():
    model = net_of(MIXING["neighbour-added"])
    parameters = dict(model.named_parameters())
    engine = engine_class("factored")(model, loss, parameters, lambda phase: contextlib.nullcontext())
    engine.accumulate(batch_of(1, 5), zero_sums(parameters, {}), 0.1, {})
    with pytest.raises(CannotRun):
        engine.accumulate(batch_of(3, 5), zero_sums(parameters, {}), 0.1, {})
    engine.close()


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_modules_are_right_or_refused(name, size, length):
    model, batch = net_of(UNUSUAL[name]), batch_of(size, length)
    _, norms = clipped("reference", model, batch, 1.0)
    clip_norm = 0.9 * float(norms.median())
    expected, norms = clipped("reference", model, batch, clip_norm)
    try:
        found, found_norms = clipped("factored", model, batch, clip_norm)
    except CannotRun:
        return
    except BadInput:
        pytest.fail("the parameter is used: the message that it gets no gradient is wrong")
    assert torch.allclose(found_norms, norms, rtol=1e-10, atol=0)
    for parameter, value in expected.items():
        assert float((found[parameter] - value).norm()) <= 1e-10 * max(float(value.norm()), 1e-3 * clip_norm), parameter


class Pair(nn.Module):
    """A parameter of its own, and two outputs."""

    def __init__(self):
        super().__init__()
        self.weight = raw(WIDTH)

    def forward(self, x):
        return x * self.weight, x


@pytest.mark.parametrize("engine", ["factored", "opacus"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        nn.LSTM(WIDTH, WIDTH, batch_first=True),
        nn.GRU(WIDTH, WIDTH, batch_first=True),
        Pair(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_of_several_outputs_is_a_sentence_and_the_reference_engine_takes_it(layer, engine):
    inputs = 3 if isinstance(layer, nn.MultiheadAttention) else 1
    model = net_of(lambda: Function(lambda self, x: self.layer(*[x] * inputs)[0], layer=layer))
    batch = batch_of(3, 5)
    with pytest.raises(CannotRun) as refused:
        clipped(engine, model, batch, 0.1)
    assert "--engine" in str(refused.value) and "reference" in str(refused.value)
    if engine == "factored":
        assert f"Layer middle.layer ({type(layer).__name__})" in str(refused.value)
    total, norms = clipped("reference", model, batch, 0.1)
    assert norms.shape == (3, 1) and bool((norms > 0.1).all()) and all(bool(t.any()) for t in total.values())


def test_batch_norm_with_frozen_statistics_is_a_scale_and_a_shift_until_it_is_trained():
    model, batch = net_of(batch_norm), batch_of(3, 5)
    norm = model.middle.norm.eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    expected, norms = clipped("reference", model, batch, 0.1)
    found, found_norms = clipped("factored", model, batch, 0.1)
    assert torch.allclose(found_norms, norms, rtol=1e-10, atol=0)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-13), name
    engine = engine_class("factored")(
        model, loss, dict(model.named_parameters()), lambda phase: contextlib.nullcontext()
    )
    norm.train()
    with pytest.raises(CannotRun, match="middle.norm is a BatchNorm that normalises by its batch"):
        engine.accumulate(batch, zero_sums(engine.parameters, {}), 0.1, {})
    engine.close()

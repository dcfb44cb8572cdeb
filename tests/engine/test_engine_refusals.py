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
from dpft.harness.errors import CannotRun

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


# Modules that keep the examples apart, in ways that a rule by layer type could get wrong. Of these some are refused:
REFUSED = {
    "reversed-batch": "times the norm it has alone",
    "parametrised": "Layer middle is parametrised",
    "weight-used-without-its-layer": "times the norm it has alone",
    "weight-shared-by-linear-and-conv1d": "kinds that have no joint rule",
    "embedding-by-frequency": "scale_grad_by_freq",
}
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


def test_the_message_names_a_batch_norm():
    with pytest.raises(CannotRun, match=r"Layer middle\.norm is a BatchNorm"):
        clipped("factored", net_of(MIXING["batch-norm"]), batch_of(3, 5), 0.1)


def test_a_layer_outside_of_any_module_that_tells_examples_apart_is_named():
    def by_hand(model, batch):
        """The model is never called, and its layer sees one row for all."""
        hidden = model.embed(batch["input_ids"]) * model.middle(torch.ones(1, WIDTH, dtype=torch.float64))
        return F.cross_entropy(model.out(hidden.mean(1)), batch["labels"], reduction="none")

    with pytest.raises(CannotRun, match=r"Layer middle \(Linear\) sees rows that .*--engine reference"):
        clipped("factored", net_of(linear), batch_of(3, 5), 0.1, by_hand)


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
    """Never wrong, and nothing but what is known to be is refused."""
    model, batch = net_of(UNUSUAL[name]), batch_of(size, length)
    _, norms = clipped("reference", model, batch, 1.0)
    clip_norm = 0.9 * float(norms.median())
    expected, norms = clipped("reference", model, batch, clip_norm)
    if name in REFUSED:
        with pytest.raises(CannotRun, match=REFUSED[name]):
            clipped("factored", model, batch, clip_norm)
        return
    found, found_norms = clipped("factored", model, batch, clip_norm)
    assert torch.allclose(found_norms, norms, rtol=1e-10, atol=0)
    for parameter, value in expected.items():
        assert float((found[parameter] - value).norm()) <= 1e-10 * max(float(value.norm()), 1e-3 * clip_norm), parameter


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

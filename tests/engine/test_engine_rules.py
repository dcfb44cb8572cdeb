"""Every layer rule of the factored engine on shapes drawn by hypothesis: float64 equality, encodings, and the fp32 bound."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.query.encoding import IDENTITY, Encoding

pytestmark = pytest.mark.usefixtures("one_thread")


class Sizes:
    """Batch size, sequence length, widths, and further integers from hypothesis."""

    def __init__(self, data):
        self.pick = lambda low, high: data.draw(st.integers(low, high))
        self.b, self.t, self.d, self.p = self.pick(1, 4), self.pick(1, 9), self.pick(1, 7), self.pick(1, 7)
        if data.draw(st.booleans()):  # sizes that coincide must not be confused
            self.t = self.d = self.p = self.b
        self.flag = data.draw(st.booleans())


def real(*shape):
    return torch.randn(shape, dtype=torch.float64)


def sequence(s, *layers):
    """The layers behind a Linear, on inputs [b, t, d], and a Linear behind them."""
    return nn.Sequential(nn.Linear(s.d, s.d), nn.Tanh(), *layers, nn.Tanh(), nn.LazyLinear(2)), real(s.b, s.t, s.d)


def image(s, *layers):
    """The layers between convolutions, on inputs [b, 2, t, p] with d channels."""
    return nn.Sequential(nn.Conv2d(2, s.d, 1), nn.Tanh(), *layers, nn.Tanh(), nn.LazyConv2d(2, 1)), real(
        s.b, 2, s.t, s.p
    )


def tokens(s, *layers):
    """The layers on tokens [b, t], of which several are equal."""
    return nn.Sequential(*layers), torch.randint(0, min(s.p, s.pick(1, 4)), (s.b, s.t))


def twice(layer):
    return layer, nn.Tanh(), layer


def table(s, width):
    layer = nn.Embedding(s.p, width, padding_idx=s.pick(0, s.p - 1) if s.pick(0, 1) else None)
    nn.init.normal_(layer.weight)  # the padding row too
    return layer


def conv1d(s):
    groups, kernel = s.pick(1, 2), s.pick(1, 3)
    options = dict(stride=s.pick(1, 2), padding=s.pick(0, 2), dilation=s.pick(1, 2), groups=groups, bias=s.flag)
    layer = nn.Conv1d(s.d * groups, s.p * groups, kernel, **options)
    return nn.Sequential(layer, nn.Tanh(), nn.Conv1d(s.p * groups, 2, 1)), real(s.b, s.d * groups, s.t + 4)


def conv2d(s):
    groups = s.pick(1, 3)
    channels, out = groups * s.pick(1, 2), groups * s.pick(1, 3)
    options = dict(stride=(s.pick(1, 2), s.pick(1, 3)), padding=(s.pick(0, 2), s.pick(0, 1)), dilation=s.pick(1, 2))
    layer = nn.Conv2d(channels, out, (s.pick(1, 3), s.pick(1, 2)), **options, groups=groups, bias=s.flag)
    return nn.Sequential(layer, nn.Tanh(), nn.Conv2d(out, 2, 1, bias=False)), real(s.b, channels, 5, 2 + s.p)


def group_norm(s):
    groups = s.pick(1, 3)
    s.d, s.t = groups * s.pick(1, 3), s.t + 1
    return image(s, nn.GroupNorm(groups, s.d))


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Raw(nn.Module):
    """A raw parameter that is broadcast over the inputs, and used twice."""

    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x * self.scale + self.scale.square()


class ClassToken(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class Root(nn.Module):
    """The model itself owns parameters, beside layers."""

    def __init__(self, length, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.token, self.gain = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.tensor(0.7))
        self.position = nn.Parameter(torch.randn(1, length + 1, width))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.inner(x)], dim=1) + self.position
        return torch.tanh(x) * self.gain


class Tied(nn.Module):
    """A table that is looked up twice and is twice the output layer."""

    def __init__(self, table, bias):
        super().__init__()
        self.table, self.out = table, nn.Linear(table.embedding_dim, table.num_embeddings, bias=bias)
        self.out.weight = table.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.table(ids))) + self.out(torch.tanh(self.table(ids.flip(1)) * 2))


def shared_weight(s):
    first, second = nn.Linear(s.d, s.d, bias=s.flag), nn.Linear(s.d, s.d)
    second.weight = first.weight
    return sequence(s, first, nn.Tanh(), second)


def tied_embedding(s):
    layer, out = table(s, s.d), nn.Linear(s.d, s.p, bias=s.flag)
    out.weight = layer.weight
    return tokens(s, layer, *twice(nn.Linear(s.d, s.d)), out)


KINDS = {
    "linear-2d": lambda s: (nn.Sequential(nn.Linear(s.d, s.p, s.flag), nn.Tanh(), nn.Linear(s.p, s.t)), real(s.b, s.d)),
    "linear-3d": lambda s: sequence(s, nn.Linear(s.d, s.p, bias=s.flag)),
    "linear-4d": lambda s: (
        nn.Sequential(nn.Linear(s.d, s.p, s.flag), nn.Tanh(), nn.Linear(s.p, 2)),
        real(s.b, 2, s.t, s.d),
    ),
    "linear-over-tokens": lambda s: sequence(s, Swapped(), nn.Linear(s.t, s.p, bias=s.flag), Swapped()),
    "hf-conv1d": lambda s: sequence(s, Conv1D(s.p, s.d)),
    "conv1d": conv1d,
    "conv2d": conv2d,
    "depthwise-conv2d": lambda s: image(s, nn.Conv2d(s.d, 2 * s.d, 3, padding="same" if s.flag else 1, groups=s.d)),
    "embedding": lambda s: tokens(s, table(s, s.d), nn.Tanh(), nn.Linear(s.d, 2)),
    "layer-norm": lambda s: sequence(s, nn.LayerNorm(s.d, bias=s.flag)),
    "layer-norm-2d": lambda s: sequence(s, nn.LayerNorm((s.t, s.d), bias=s.flag)),
    "group-norm": group_norm,
    "rms-norm": lambda s: sequence(s, nn.RMSNorm((s.t, s.d) if s.flag else s.d)),
    "llama-rms-norm": lambda s: sequence(s, LlamaRMSNorm(s.d)),
    "raw-scalar": lambda s: sequence(s, Raw() if s.flag else Raw(1)),
    "raw-vector": lambda s: sequence(s, Raw(s.d)),
    "raw-channels": lambda s: image(s, Raw(s.d, 1, 1)),
    "raw-positions": lambda s: sequence(s, Raw(1, s.t, s.d)),
    "raw-positions-without-leading-dimension": lambda s: sequence(s, Raw(s.t, s.d)),
    "class-token": lambda s: sequence(s, ClassToken(s.d), Raw(1, s.t + 1, s.d)),
    "parameters-of-the-model": lambda s: (Root(s.t, s.d), real(s.b, s.t, s.d)),
    "linear-used-twice": lambda s: sequence(s, *twice(nn.Linear(s.d, s.d, bias=s.flag))),
    "hf-conv1d-used-twice": lambda s: sequence(s, *twice(Conv1D(s.d, s.d))),
    "layer-norm-used-twice": lambda s: sequence(s, *twice(nn.LayerNorm(s.d))),
    "rms-norm-used-twice": lambda s: sequence(s, *twice(LlamaRMSNorm(s.d))),
    "conv2d-used-twice": lambda s: image(s, *twice(nn.Conv2d(s.d, s.d, 3, padding=1, bias=s.flag))),
    "raw-vector-used-twice": lambda s: sequence(s, *twice(Raw(s.d))),
    "weight-shared-by-two-layers": shared_weight,
    "tied-embedding": tied_embedding,
    "tied-embedding-used-twice": lambda s: tokens(s, Tied(table(s, s.d), s.flag)),
}


def loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().flatten(1).sum(1)


def clipped(name, model, batch, clip_norm, encodings):
    parameters = dict(model.named_parameters())
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    total = zero_sums(parameters, encodings)
    try:
        return total, engine.accumulate(batch, total, clip_norm, encodings)[1]
    finally:
        engine.close()


def random_encodings(model, weighted):
    """Dense and index maps on either side of matrices, on the left of vectors; tables get rows in order on the left.

    weighted: and each entry of what comes out has a weight of its own, also where there are no sides.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def side(n):
        choice, kept = int(torch.randint(0, 3, ())), int(torch.randint(1, n + 1, ()))
        return [None, real(n, kept), torch.randperm(n)[:kept]][choice]

    encodings = {}
    for name, p in model.named_parameters():
        if p.dim() in (1, 2):
            left = side(len(p))
            if id(p) in tables and left is not None:
                left = None if left.dim() == 2 else left.sort().values
            encodings[name] = Encoding(left, side(p.shape[1]) if p.dim() == 2 else None, scale=1.5)
        if weighted:
            sides = encodings.get(name, IDENTITY)
            encodings[name] = replace(sides, weights=10 ** real(*sides.shape(p.shape)))
    return encodings


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=25, derandomize=True, phases=[Phase.generate])
def test_rule(name, data):
    sizes, seed, encoded = Sizes(data), data.draw(st.integers(0, 99)), data.draw(st.booleans())
    torch.manual_seed(seed)
    model, x = KINDS[name](sizes)
    model = model.double()
    batch = {"x": x, "y": torch.randn_like(model(x).detach())}  # this call also makes the lazy layers
    encodings = random_encodings(model, data.draw(st.booleans())) if encoded else {}
    norms = clipped("reference", model, batch, 1.0, encodings)[1]
    check_equal(model, batch, 0.9 * float(norms.median()), encodings)
    check_bound(model.float(), batch, norms, encodings)


def check_equal(model, batch, clip_norm, encodings):
    """Norms and every clipped sum, in float64, about half of the examples clipped."""
    expected, norms = clipped("reference", model, batch, clip_norm, encodings)
    found, found_norms = clipped("factored", model, batch, clip_norm, encodings)
    assert torch.allclose(found_norms, norms, rtol=1e-10, atol=1e-12)
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        # what is zero in exact arithmetic (behind the norm of one number) is rounding: measured against the largest
        scale = max(float(value.norm()), 1e-3 * largest, 1e-3)
        assert float((found[name] - value).norm()) <= 1e-10 * scale, name


def check_bound(model, batch, norms, encodings):
    """In fp32 one example adds at most C, and what is clipped adds C and not much less."""
    for i, norm in enumerate(norms[:, 0].tolist()):
        one = {key: v[i : i + 1] for key, v in batch.items()}
        one = {key: v.float() if v.is_floating_point() else v for key, v in one.items()}
        clip_norm = 0.3 * norm
        if norm < 1e-3:  # nothing but rounding
            continue
        total, _ = clipped("factored", model, one, clip_norm, encodings)
        assert clip_norm * (1 - 1e-3) <= norm_of(total) <= clip_norm * (1 + 1e-6)


def norm_of(total):
    return math.sqrt(sum(float(value.double().square().sum()) for value in total.values()))

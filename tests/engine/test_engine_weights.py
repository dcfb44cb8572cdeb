"""Entrywise weights before the clip: sums and norms are those of per-example autograd in float64, weighted by hand."""

import math

import pytest
import torch
from engine_cases import assert_same, no_clock
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dpft.harness.engine import NAMES, engine_class, weighted
from dpft.harness.engine.agreement import check
from dpft.harness.engine.base import PlainEngine, zero_sums
from dpft.harness.engine.pieces import EmbeddingPiece, KeptPiece, LinearPiece
from dpft.harness.errors import CannotRun
from dpft.harness.memory.engines import Materialised
from dpft.harness.query.encoding import Encoding
from dpft.tasks.vocabulary import vocabulary_loss

VOCABULARY, WIDTH = 13, 6

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """A table, GPT-2's Conv1D, a convolution over the tokens, a norm and an output layer, which may be the table."""

    def __init__(self, out="own"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.table = out, nn.Embedding(VOCABULARY, WIDTH, padding_idx=2)
        nn.init.normal_(self.table.weight)
        self.wide, self.back = Conv1D(WIDTH + 3, WIDTH), nn.Linear(WIDTH + 3, WIDTH)
        self.wide.bias.data.normal_()
        self.mix, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.LayerNorm(WIDTH)
        if out == "vocabulary":
            self.out = vocabulary_loss()(self.table.weight)
            self.out.at_once = 3 * VOCABULARY * 4  # two slices and more
        else:
            self.out = nn.Linear(WIDTH, VOCABULARY)
        if out == "tied":
            self.out.weight = self.table.weight

    def forward(self, ids, labels):
        hidden = self.table(ids)
        hidden = self.norm(hidden + self.back(torch.tanh(self.wide(hidden))))
        hidden = torch.tanh(hidden + self.mix(hidden.mT).mT)
        if self.kind == "vocabulary":
            return self.out(hidden, labels, self.out.weight)
        return F.cross_entropy(self.out(hidden).mT, labels, reduction="none").sum(1)


KINDS = ("own", "tied", "vocabulary")


def loss(model, batch):
    return model(batch["ids"], batch["labels"])


def batch_of(size=5, length=7):
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (size, length))
    ids[:, 1::3] = ids[:, :1]
    return {"ids": ids, "labels": torch.randint(0, VOCABULARY, (size, length))}


def weights_of(model):
    """Over four decades."""
    torch.manual_seed(2)
    return {name: 10 ** (4 * torch.rand_like(p) - 2) for name, p in model.named_parameters()}


def by_hand(model, batch, weights, clip_norm):
    total, norms = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, []
    for i in range(len(batch["ids"])):
        value = loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0]
        found = dict(zip(total, torch.autograd.grad(value, list(model.parameters())), strict=True))
        scaled = {name: g * weights[name] for name, g in found.items()}
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in scaled.values())))
        for name, g in scaled.items():
            total[name] += g * min(1.0, clip_norm / norms[-1])
    return total, torch.tensor(norms, dtype=torch.float64)[:, None]


def accumulated(kind, model, batches, clip_norm, weights):
    engine = kind(model, loss, dict(model.named_parameters()), no_clock)
    encodings = {name: Encoding(weights=w) for name, w in weights.items()}
    total, norms = zero_sums(engine.parameters, encodings), []
    for batch in batches:
        norms.append(engine.accumulate(batch, total, clip_norm, encodings)[1])
    engine.close()
    return total, torch.cat(norms)


@pytest.mark.parametrize("at_once", [1, 200, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "materialised"])
def test_every_entry_is_weighted_before_the_norm_is_taken(name, kind, at_once, monkeypatch):
    if at_once != 1 << 20 and name != "factored":
        pytest.skip("only the factored engine makes gradients piece by piece")
    if name in ("opacus", "materialised") and kind != "own":
        pytest.skip("these know no shared tables")
    monkeypatch.setattr(weighted, "AT_ONCE", at_once)
    model, batch = Mixed(kind).double(), batch_of()
    if name == "opacus":
        model.wide, model.table.padding_idx = nn.Linear(WIDTH, WIDTH + 3).double(), None  # what its samplers know
    weights = weights_of(model)
    clip_norm = float(by_hand(model, batch, weights, 1.0)[1].median())
    expected, norms = by_hand(model, batch, weights, clip_norm)
    split = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 1), slice(1, 4), slice(4, 5))]
    for batches in ([batch], split):
        engine = Materialised if name == "materialised" else engine_class(name)
        found, found_norms = accumulated(engine, model, batches, clip_norm, weights)
        torch.testing.assert_close(found_norms, norms, rtol=1e-10, atol=0)
        assert_same(found, expected, 1e-10)


def test_factors_are_kept_where_they_are_smaller_and_a_table_is_never_made():
    """What the sums are made of; a wide layer on few tokens is the case that matters for memory."""
    torch.manual_seed(0)
    inputs, gradients, w = torch.randn(4, 3, 20), torch.randn(4, 3, 30), torch.rand(30, 20)
    (piece,) = weighted.weighted([LinearPiece(inputs, gradients)], w)
    assert isinstance(piece, weighted.WeightedPiece)
    (kept,) = weighted.weighted([KeptPiece(gradients.mT @ inputs)], w)
    assert isinstance(kept, KeptPiece) and torch.allclose(kept.gradients, piece.made(slice(None)), rtol=1e-5)
    table = EmbeddingPiece(torch.tensor([[7, 7, 1]]), gradients[:1])
    (rows,) = weighted.weighted([table], torch.arange(900.0).view(30, 30))
    assert isinstance(rows, EmbeddingPiece) and rows.gradients.shape == (1, 3, 30)
    assert torch.equal(rows.gradients[0, 2], gradients[0, 2] * torch.arange(30.0, 60.0))


def test_one_example_adds_no_more_than_the_bound_in_fp32_where_its_terms_cancel():
    """The numbers that are summed are those that were measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 1, bias=False))
    x = 1e3 * torch.randn(1, 9, 12).repeat(1, 2, 1)
    batch = {"x": x + 1e-3 * torch.randn_like(x), "sign": torch.tensor([1.0] * 9 + [-1.0] * 9)[None]}
    weights = {name: 10 ** torch.randn_like(p) for name, p in model.named_parameters()}
    encodings = {name: Encoding(weights=w) for name, w in weights.items()}
    engine = engine_class("factored")(
        model, lambda m, b: (m(b["x"])[..., 0] * b["sign"]).sum(1), dict(model.named_parameters()), no_clock
    )
    engine.agreed = True  # plain autograd rounds differently
    total = zero_sums(engine.parameters, encodings)
    _, norms = engine.accumulate(batch, total, 1e-3, encodings)
    assert float(norms) > 1e-3
    assert math.sqrt(sum(float(t.double().square().sum()) for t in total.values())) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS[1:])  # a tiny weight's gradients are kept, and have no second chance to differ
def test_the_check_before_a_phase_passes_and_sees_weights_that_come_after_the_clip(kind, monkeypatch):
    """The planted bug: the unweighted norm is clipped, the weighted gradient is summed; one example adds more than C."""
    model, batch = Mixed(kind), batch_of()
    encodings = {name: Encoding(weights=w) for name, w in weights_of(model).items()}
    engine = engine_class("factored")(model, loss, dict(model.named_parameters()), no_clock)
    check(engine, batch, encodings, 0.5)
    bare = weighted.WeightedPiece.squared_norms
    monkeypatch.setattr(
        weighted.WeightedPiece,
        "squared_norms",
        lambda self, grams: bare(weighted.WeightedPiece(self.pieces, torch.ones_like(self.weights)), grams),
    )
    with pytest.raises(CannotRun):
        check(engine, batch, encodings, 0.5)
    engine.close()


def test_the_engine_without_clipping_weights_the_sum():
    model, batch, weights = Mixed().double(), batch_of(), weights_of(Mixed().double())
    found, _ = accumulated(PlainEngine, model, [batch], math.inf, weights)
    assert_same(found, by_hand(model, batch, weights, math.inf)[0], 1e-10)


def test_lift_is_the_transpose_and_magnitudes_come_last():
    torch.manual_seed(0)
    left, right = torch.randn(6, 3).double(), torch.tensor([0, 2])
    one = Encoding(left, right, scale=2.0, weights=torch.randn(3, 2).double())
    g, x = torch.randn(6, 4).double(), torch.randn(3, 2).double()
    mapped = one.finished(one.dense(g[None])[0])
    assert torch.allclose((mapped * x).sum(), (g * one.lift(x, torch.Size((6, 4)))).sum())
    magnitudes = Encoding(absolute=True, weights=-torch.ones(6, 4).double())
    assert torch.equal(magnitudes.finished(g), g.abs())

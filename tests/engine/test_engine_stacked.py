"""Stacks of encodings: several maps of one parameter in one ball, on every engine, against whole gradients in float64."""

import pytest
import torch
from engine_cases import assert_same, clipped, no_clock
from net_cases import WIDTH, Function, batch_of, linear, loss, net_of
from torch import nn

from dpft.harness.engine import pieces, rules
from dpft.harness.engine.base import example_gradient
from dpft.harness.engine.reference import ReferenceEngine
from dpft.harness.errors import CannotRun
from dpft.harness.query.encoding import Complement, Encoding, Stacked

pytestmark = pytest.mark.usefixtures("one_thread")


def orthonormal(size, rank, seed):
    random = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(random).Q


def stack(shape, complement, rank=2):
    m, n = shape[0], shape[1:].numel()
    left, right = orthonormal(m, rank, 1), orthonormal(n, rank, 2)
    first = Encoding(left=Complement(left), right=right) if complement else Encoding(right=right)
    return Stacked(parts=(first, Encoding(left=left))), left, right


def by_hand(g, left, right, complement):
    """What a stack makes of one example's gradient, flat."""
    g = g.flatten(1)
    columns = g @ right
    if complement:
        columns = columns - left @ left.T @ columns
    return torch.cat([columns.flatten(), (left.T @ g).flatten()])


def convolution():
    """An image of the tokens: [b, t, WIDTH] as WIDTH channels of length t."""
    return Function(lambda self, x: self.inner(x.mT).mT, inner=nn.Conv1d(WIDTH, WIDTH, 3, padding=1))


def grouped():
    return Function(lambda self, x: self.inner(x.mT).mT, inner=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2))


def transposed():
    from transformers.pytorch_utils import Conv1D

    return Function(lambda self, x: self.inner(x), inner=Conv1D(WIDTH, WIDTH))


def shared():
    """One layer, used twice."""
    return Function(lambda self, x: self.inner(torch.tanh(self.inner(x))), inner=linear())


def unknown():
    """A layer without a rule of its own."""
    return Function(lambda self, x: x @ self.weight.mT, weight=nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH)))


BUILDS = (linear, convolution, grouped, transposed, shared, unknown)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_engines_agree_with_whole_gradients(build, complement, monkeypatch):
    model, batch = net_of(build), batch_of(5, 6)
    if build is transposed:
        nn.init.normal_(model.middle.inner.weight)
    parameters = dict(model.named_parameters())
    (name,) = [n for n in parameters if n.startswith("middle") and n.endswith("weight")]
    encoding, left, right = stack(parameters[name].shape, complement)
    rows = []
    reference = ReferenceEngine(model, loss, parameters, no_clock)
    for i in range(5):
        _, g = example_gradient(reference, {k: v[i : i + 1] for k, v in batch.items()}, {})
        flat = [by_hand(g[n], left, right, complement) if n == name else g[n].flatten() for n in parameters]
        rows.append((torch.cat(flat), g))
    norms = torch.stack([row.norm() for row, _ in rows])
    bound = 0.9 * float(norms.median())
    scales = (bound / norms).clamp_max(1.0)
    expected = sum(s * by_hand(g[name], left, right, complement) for s, (_, g) in zip(scales, rows, strict=True))
    engines = ["factored", "reference"] + ["opacus"] * (build in (linear, convolution, shared))
    for kept in (True, False):  # as materialised parts, and as factors
        monkeypatch.setattr(rules, "cheaper_kept", lambda inputs, width, kept=kept: kept)
        for engine in engines:
            total, _, found = clipped(engine, model, batch, bound, {name: encoding}, parameters, loss)
            assert torch.allclose(found[:, 0], norms, rtol=1e-9), engine
            assert_same(total, {name: expected}, 1e-9)
            assert total[name].shape == encoding.shape(parameters[name].shape)


def test_the_transpose_puts_back_what_lies_side_by_side():
    shape = torch.Size((5, 3, 2))
    for complement in (False, True):
        encoding, left, right = stack(shape, complement)
        g = torch.randn(shape, dtype=torch.float64)
        x = torch.randn(encoding.shape(shape), dtype=torch.float64)
        assert encoding.shape(shape) == (5 * 2 + 2 * 6,) and encoding.reach(shape) == 30
        mapped = encoding.dense(g[None])[0]
        assert torch.allclose(mapped, by_hand(g, left, right, complement))
        assert float(mapped @ x) == pytest.approx(float((g * encoding.lift(x, shape)).sum()), rel=1e-12)


def test_no_part_of_a_layer_forms_a_whole_gradient(monkeypatch):
    """Materialised or not, nothing of [batch, 40, 30] is made."""
    model = nn.Sequential(nn.Embedding(9, 30), nn.Linear(30, 40), nn.Flatten(), nn.Linear(240, 3)).double()
    parameters = {n: p for n, p in model.named_parameters() if n == "1.weight"}
    for n, p in model.named_parameters():
        p.requires_grad_(n in parameters)
    made, kept = [], pieces.KeptPiece

    def watched(gradients):
        made.append(gradients.shape)
        return kept(gradients)

    monkeypatch.setattr(rules, "KeptPiece", watched)
    encoding, *_ = stack(parameters["1.weight"].shape, True)
    clipped("factored", model, batch_of(5, 6), 0.1, {"1.weight": encoding}, parameters, loss=sequential)
    assert made and all(shape in ((5, 40, 2), (5, 2, 30)) for shape in made)


def sequential(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def test_a_tied_table_is_refused_in_a_sentence():
    model = net_of(linear)
    model.out = nn.Linear(WIDTH, 9, bias=False).double()
    model.out.weight = model.embed.weight
    encoding, *_ = stack(model.embed.weight.shape, False)
    with pytest.raises(CannotRun, match="dense row encoding; use --engine reference"):
        clipped("factored", model, batch_of(5, 6), 0.1, {"embed.weight": encoding}, None, loss)


def test_a_rule_that_knows_nothing_of_stacks_cannot_take_one_for_the_identity():
    encoding, *_ = stack(torch.Size((4, 4)), False)
    for side in (encoding.rows, encoding.columns):
        with pytest.raises(RuntimeError, match="encode by its parts"):
            side(torch.zeros(2, 4))

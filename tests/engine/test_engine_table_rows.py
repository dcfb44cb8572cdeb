"""Some rows of an embedding table: sums and norms are those of per-example autograd in float64, cut to the rows."""

import math

import pytest
import torch
from engine_cases import assert_same, no_clock
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine import NAMES, engine_class
from dpft.harness.engine.agreement import check
from dpft.harness.engine.base import RunningSums, zero_sums
from dpft.harness.errors import CannotRun
from dpft.harness.memory.engines import Materialised
from dpft.harness.query.encoding import Encoding
from dpft.tasks.vocabulary import vocabulary_loss

VOCABULARY, WIDTH = 13, 6
ROWS = {
    "some": [0, 3, 4, 7, 12],
    "one": [5],
    "all": list(range(VOCABULARY)),
    "nobody's": [11],  # no token of the batch
    "none": [],
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Tables(nn.Module):
    """Looked up once, twice, or as output layer too; `out` is the layer that may share the table."""

    def __init__(self, kind, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.kind = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding), kind
        nn.init.normal_(self.table.weight)
        self.mix = nn.Linear(WIDTH, WIDTH)
        if kind == "shared":  # a second module with the same table, that has another padding
            self.other = nn.Embedding(VOCABULARY, WIDTH, padding_idx=7)
            self.other.weight = self.table.weight
        if kind == "tied":
            self.out = nn.Linear(WIDTH, VOCABULARY)
            self.out.weight = self.table.weight
        if kind == "vocabulary":
            self.out = vocabulary_loss()(self.table.weight)
            self.out.at_once = 3 * VOCABULARY * 4  # two slices and more

    def forward(self, ids, labels):
        hidden = torch.tanh(self.mix(self.table(ids)))
        if self.kind in ("re-used", "shared"):
            again = self.other if self.kind == "shared" else self.table
            hidden = hidden * again(ids.flip(1) * 2 % VOCABULARY)
        if self.kind == "vocabulary":
            return self.out(hidden, labels, self.out.weight)
        scores = self.out(hidden) if self.kind == "tied" else hidden
        return F.cross_entropy(scores.mT, labels % scores.shape[2], reduction="none").sum(1)


KINDS = ("once", "re-used", "shared", "tied", "vocabulary")


def loss(model, batch):
    return model(batch["ids"], batch["labels"])


def batch_of(size=5, length=7):
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY - 2, (size, length))  # 11 and 12 are nobody's
    ids[:, 1::3] = ids[:, :1]
    return {"ids": ids, "labels": torch.randint(0, VOCABULARY, (size, length))}


def encoding(rows, right=None, scale=1.0):
    return {"table.weight": Encoding(torch.tensor(rows, dtype=torch.long), right, scale)}


SIDES = {
    "rows": {},
    "scaled": {"scale": 3.0},
    "columns": {"right": torch.tensor([1, 4]), "scale": 0.5},
    "projected": {"right": torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(5)).double(), "scale": 2.0},
}


def by_hand(model, batch, encodings, clip_norm):
    """(clipped sums, norms [b, 1]) of plain autograd, in the encoded shapes."""
    one = encodings["table.weight"]
    total, norms = zero_sums(dict(model.named_parameters()), encodings), []
    for i in range(len(batch["ids"])):
        value = loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0]
        found = dict(zip(total, torch.autograd.grad(value, list(model.parameters())), strict=True))
        kept = found["table.weight"][one.left] * one.scale
        if one.right is not None:
            kept = kept[:, one.right] * one.scale if one.right.dim() == 1 else kept @ one.right
        found["table.weight"] = kept
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in found.values())))
        for name, g in found.items():
            total[name] += g * min(1.0, clip_norm / norms[-1])
    return total, torch.tensor(norms, dtype=torch.float64)[:, None]


def accumulated(kind, model, batches, clip_norm, encodings):
    engine = kind(model, loss, dict(model.named_parameters()), no_clock)
    total, norms = zero_sums(engine.parameters, encodings), []
    for batch in batches:
        norms.append(engine.accumulate(batch, total, clip_norm, encodings)[1])
    engine.close()
    return total, torch.cat(norms)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind, padding, rows, side):
    model, batch, encodings = Tables(kind, padding).double(), batch_of(), encoding(ROWS[rows], **SIDES[side])
    norms = by_hand(model, batch, encodings, 1.0)[1]
    clip_norm = float(norms.median())
    expected, norms = by_hand(model, batch, encodings, clip_norm)
    split = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 1), slice(1, 4), slice(4, 5))]
    factored, reference = engine_class("factored"), engine_class("reference")
    for engine, batches in ((reference, [batch]), (factored, [batch]), (factored, split)):
        found, found_norms = accumulated(engine, model, batches, clip_norm, encodings)
        torch.testing.assert_close(found_norms, norms, rtol=1e-10, atol=0)
        assert_same(found, expected, 1e-10)


def test_a_norm_counts_the_kept_rows_only():
    model, batch = Tables("once").double(), batch_of()
    engine = engine_class("factored")
    norms = [accumulated(engine, model, [batch], 1.0, encoding(ROWS[rows]))[1] for rows in ("none", "one", "all")]
    has = (batch["ids"] == 5).any(1)
    assert 0 < int(has.sum()) < len(has)
    torch.testing.assert_close(norms[0][~has], norms[1][~has], rtol=1e-12, atol=0)
    assert (norms[1][has] > norms[0][has]).all() and (norms[2] > norms[1]).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_check_before_a_phase_passes(name, kind, rows):
    if name == "opacus" and kind != "once":
        pytest.skip("Opacus knows no shared tables")
    model = Tables(kind, None)
    engine = engine_class(name)(model, loss, dict(model.named_parameters()), no_clock)
    check(engine, batch_of(), encoding(ROWS[rows]), 0.5)
    engine.close()


@pytest.mark.parametrize("wrong", ["not a place", "another place"])
def test_the_check_sees_tokens_at_the_wrong_place(wrong, monkeypatch):
    from dpft.harness.engine import rules

    among = rules._among

    def misplaced(rows, tokens, use):
        places, kept = among(rows, tokens, use)
        return (places, kept | True) if wrong == "not a place" else ((places + 1) % len(rows), kept)

    monkeypatch.setattr(rules, "_among", misplaced)
    model = Tables("once")
    engine = engine_class("factored")(model, loss, dict(model.named_parameters()), no_clock)
    with pytest.raises(CannotRun):
        check(engine, batch_of(), encoding(ROWS["some"]), 0.5)
    engine.close()


@pytest.mark.parametrize("kind", ["once", "re-used"])
def test_materialised_gradients_have_the_kept_rows_only(kind):
    model, batch, encodings = Tables(kind).double(), batch_of(), encoding(ROWS["some"])
    expected, norms = by_hand(model, batch, encodings, 0.5)
    found, found_norms = accumulated(Materialised, model, [batch], 0.5, encodings)
    assert_same(found, expected, 1e-10)
    torch.testing.assert_close(found_norms, norms, rtol=1e-10, atol=0)


def test_no_gradient_of_the_whole_table_is_made():
    """Nothing that a pass makes is as large as the table; [vocabulary] numbers are allowed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func is not torch.ops.aten.detach.default:
                self.size = max(self.size, out.untyped_storage().nbytes())
            return out

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(20_000, 16), nn.Linear(16, 3)

        def forward(self, ids, labels):
            return F.cross_entropy(self.out(self.table(ids).mean(1)), labels[:, 0] % 3, reduction="none")

    model = Long()
    engine = engine_class("factored")(model, loss, dict(model.named_parameters()), no_clock)
    engine.agreed = True  # plain autograd makes the whole gradient of a few examples once
    encodings = encoding(list(range(0, 20_000, 200)))
    with Largest() as largest:
        engine.accumulate(batch_of(), RunningSums(engine.parameters, encodings), 0.5, encodings)
    engine.close()
    assert 0 < largest.size <= 20_000 * 8


@pytest.mark.parametrize("rows", [[3, 3], [4, 3], [-1, 2], [2, VOCABULARY]])
def test_rows_that_are_no_rows_are_refused(rows):
    with pytest.raises(
        RuntimeError, match="rows kept of the table of table must be distinct, ascending and among its 13"
    ):
        accumulated(engine_class("factored"), Tables("once"), [batch_of()], 0.5, encoding(rows))


def test_what_has_no_rule_is_refused_by_name():
    engine = engine_class("factored")
    dense = {"table.weight": Encoding(left=torch.randn(VOCABULARY, 2))}
    with pytest.raises(CannotRun, match="Embedding table.weight has .* a dense row encoding; use --engine reference"):
        accumulated(engine, Tables("once"), [batch_of()], 0.5, dense)
    model = Tables("shared")
    model.other.max_norm = 1.0
    with pytest.raises(CannotRun, match="max_norm"):
        accumulated(engine, model, [batch_of()], 0.5, encoding([1, 2]))

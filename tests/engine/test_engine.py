"""The engines against per-example autograd in float64: clipped sums, norms, encodings, and what must raise."""

import contextlib

import pytest
import torch
from engine_cases import CONFIGS, assert_same, batch_for, clipped, loss, model_for, no_clock
from torch import nn

from dpft.harness.engine import NAMES, engine_class
from dpft.harness.engine.agreement import check
from dpft.harness.engine.base import zero_sums
from dpft.harness.engine.clipping import abadi
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.query.encoding import Encoding


@pytest.mark.parametrize("kind", CONFIGS)
def test_factored_equals_per_example_autograd(kind):
    model, batch = model_for(kind), batch_for(kind)
    expected, losses, norms = clipped("reference", model, batch)
    found, losses2, norms2 = clipped("factored", model, batch)
    assert torch.allclose(losses, losses2, rtol=1e-12)
    assert torch.allclose(norms, norms2, rtol=1e-10)
    assert (norms > 0.5).any(), "nothing was clipped, so clipping was not tested"
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_opacus_engine_equals_per_example_autograd(kind):
    model, batch = model_for(kind), batch_for(kind)
    if (
        kind == "roberta"
    ):  # Opacus gives the padding row of an embedding a gradient, autograd gives none: no padding here
        batch["input_ids"][batch["input_ids"] == 1] = 7
        batch["attention_mask"][:] = 1
    expected, *_ = clipped("reference", model, batch)
    found, *_ = clipped("opacus", model, batch)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_no_clipped_gradient_exceeds_the_bound(name):
    model = model_for("bert", torch.float32)
    for seed in range(5):
        batch = {key: value[seed : seed + 1] for key, value in batch_for("bert").items()}
        for clip_norm in (1e-3, 0.1, 1.0):
            total, _, _ = clipped(name, model, batch, clip_norm)
            norm = torch.stack([t.double().square().sum() for t in total.values()]).sum().sqrt()
            assert norm <= clip_norm * (1 + 1e-6)


def test_bound_holds_under_bf16_autocast():
    model, batch = model_for("bert", torch.float32), batch_for("bert")

    def half(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    for i in range(5):
        total, _, norms = clipped("factored", model, {k: v[i : i + 1] for k, v in batch.items()}, 0.1, loss=half)
        norm = torch.stack([t.double().square().sum() for t in total.values()]).sum().sqrt()
        assert norm <= 0.1 * (1 + 1e-6)
        assert norms[0] > 0.1


def test_microbatches_and_padding_do_not_change_the_sum():
    model, batch = model_for("bert"), batch_for("bert")
    whole, _, _ = clipped("factored", model, batch)
    parts = zero_sums(dict(model.named_parameters()), {})
    engine = engine_class("factored")(model, loss, dict(model.named_parameters()), no_clock)
    for rows in ([4], [0, 2], [3, 1]):
        longest = int(batch["attention_mask"][rows].sum(1).max())
        micro = {k: v[rows] if k == "labels" else v[rows, :longest] for k, v in batch.items()}
        engine.accumulate(micro, parts, 0.5, {})
    engine.close()
    assert_same(parts, whole, 1e-12)


def test_changing_one_example_changes_only_its_own_gradient():
    model, batch = model_for("bert"), batch_for("bert")
    other = {k: v.clone() for k, v in batch.items()}
    other["input_ids"][2, :3] = torch.tensor([6, 7, 8])
    a, _, na = clipped("factored", model, batch, 0.5)
    b, _, nb = clipped("factored", model, other, 0.5)
    assert torch.equal((na != nb)[:, 0].nonzero().flatten(), torch.tensor([2]))
    distance = torch.stack([(a[n] - b[n]).square().sum() for n in a]).sum().sqrt()
    assert 0 < distance <= 2 * 0.5


@pytest.mark.parametrize("engine", NAMES)
def test_encodings_act_like_the_dense_map(engine):
    model, batch = model_for("bert"), batch_for("bert")
    parameters = {n: p for n, p in model.named_parameters() if "layer.0" in n or "head" in n}
    for n, p in model.named_parameters():
        p.requires_grad_(n in parameters)
    torch.manual_seed(3)
    query, value = (f"encoder.encoder.layer.0.attention.self.{x}.weight" for x in ("query", "value"))
    if query not in parameters:
        query, value = [n for n in parameters if n.endswith("weight") and parameters[n].shape == (16, 16)][:2]
    maps = {
        query: Encoding(left=torch.randn(16, 4, dtype=torch.float64), right=torch.tensor([1, 5, 7])),
        value: Encoding(right=torch.randn(16, 3, dtype=torch.float64)),
        "head.bias": Encoding(left=torch.tensor([2])),
        "head.weight": Encoding(left=torch.tensor([0, 2])),
    }
    found, _, norms = clipped(engine, model, batch, 0.05, maps)
    # by hand: plain per-example gradients, mapped, clipped and summed
    expected, squares = zero_sums(parameters, maps), []
    rows = []
    for i in range(len(batch["labels"])):
        value_i = loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0]
        grads = dict(zip(parameters, torch.autograd.grad(value_i, list(parameters.values())), strict=True))
        grads[query] = maps[query].left.T @ grads[query][:, [1, 5, 7]]
        grads[value] = grads[value] @ maps[value].right
        grads["head.bias"] = grads["head.bias"][[2]]
        grads["head.weight"] = grads["head.weight"][[0, 2]]
        rows.append(grads)
        squares.append(sum(g.square().sum() for g in grads.values()))
    by_hand = torch.stack(squares).sqrt()
    assert torch.allclose(norms[:, 0], by_hand, rtol=1e-10)
    for factor, grads in zip(abadi(by_hand, 0.05), rows, strict=True):
        for n, g in grads.items():
            expected[n] += factor * g
    assert_same(found, expected, 1e-10)


class Tied(nn.Module):
    """A table used for input and output, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, input_ids):
        return self.out(torch.tanh(self.mix(torch.tanh(self.mix(self.embed(input_ids))))))


@pytest.mark.parametrize("thin", [False, True])
def test_tied_and_reused_layers_keep_their_cross_terms(thin):
    torch.manual_seed(0)
    model = Tied().double()
    length = 12 if thin else 3  # long sequences keep gradients, short ones take grams
    batch = {"input_ids": torch.randint(0, 11, (4, length)), "labels": torch.randint(0, 11, (4, length))}

    def token_loss(model, batch):
        return nn.functional.cross_entropy(model(batch["input_ids"]).mT, batch["labels"], reduction="none").mean(1)

    expected, _, norms = clipped("reference", model, batch, 0.05, loss=token_loss)
    found, _, norms2 = clipped("factored", model, batch, 0.05, loss=token_loss)
    assert torch.allclose(norms, norms2, rtol=1e-10)
    assert_same(found, expected, 1e-10)


class Broadcast(nn.Module):
    """Position embeddings looked up once and broadcast over the batch: the classic trap."""

    def __init__(self, leading: bool):
        super().__init__()
        self.embed, self.position, self.out = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 3)
        self.leading = leading

    def forward(self, input_ids):
        positions = torch.arange(input_ids.shape[1])
        return self.out((self.embed(input_ids) + self.position(positions[None] if self.leading else positions)).mean(1))


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("length", [5, 3])
def test_positions_looked_up_once_for_the_batch_are_told_apart(length, leading):
    """Without the leading dimension there is a row for each position, with length 3 as many as there are examples."""
    batch = {"input_ids": torch.randint(0, 9, (3, length)), "labels": torch.tensor([0, 1, 2])}
    model = Broadcast(leading).double()
    expected, *_ = clipped("reference", model, batch, 0.1)
    found, *_ = clipped("factored", model, batch, 0.1)
    assert_same(found, expected, 1e-10)


class Peeking(nn.Module):
    """Looks at the values of its input, which no vectorised map can."""

    def __init__(self, above):
        super().__init__()
        self.scale, self.above = nn.Parameter(torch.tensor([1.0, 2, 3, 4])), above

    def forward(self, x):
        return x * self.scale if float(x.detach().flatten()[0]) > self.above else -x * self.scale.square()


class PooledNet(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.embed, self.middle, self.out = nn.Embedding(9, 4), middle, nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.out(self.middle(self.embed(input_ids).mean(1)))


def test_layers_that_cannot_be_vectorised_are_run_one_by_one():
    batch = {"input_ids": torch.randint(0, 9, (3, 5)), "labels": torch.tensor([0, 1, 2])}
    model = PooledNet(Peeking(1e9)).double()
    expected, *_ = clipped("reference", model, batch, 0.1)
    assert_same(clipped("factored", model, batch, 0.1)[0], expected, 1e-10)


def test_what_decides_by_the_batch_is_refused():
    torch.manual_seed(1)
    batch = {"input_ids": torch.tensor([[1] * 5, [2] * 5, [3] * 5]), "labels": torch.tensor([0, 1, 2])}
    model = PooledNet(Peeking(0.0)).double()
    with torch.no_grad():  # the first example decides for all
        model.embed.weight[1:4, 0] = torch.tensor([1.0, -1.0, -1.0])
    with pytest.raises(CannotRun, match="than alone|it has alone"):
        clipped("factored", model, batch, 0.1)
    with pytest.raises(CannotRun, match="Layer middle is a BatchNorm"):
        clipped("factored", PooledNet(nn.BatchNorm1d(4)), batch)


@pytest.mark.parametrize("name", NAMES)
def test_an_unused_trainable_parameter_raises(name):
    model = model_for("bert")
    model.extra = nn.Linear(3, 3).double()
    with pytest.raises(BadInput, match="extra"):
        clipped(name, model, batch_for("bert"))


def test_rules_by_opacus_for_convolutions_and_group_norm():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    batch = {"x": torch.randn(4, 3, 6, 6, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 0])}
    model = Net().double()
    expected, *_ = clipped("reference", model, batch, 0.1)
    found, *_ = clipped("factored", model, batch, 0.1)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("length", [127, 128, 131])
def test_grams_of_long_sequences_are_made_of_halves(length):
    """Equality where the gram is split, at even and odd lengths, for Linear layers and for an embedding with repeats."""

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(40, 300), nn.Linear(300, 310), nn.Linear(310, 3)

        def forward(self, input_ids):
            return self.out(torch.tanh(self.mix(self.embed(input_ids))).mean(1))

    torch.manual_seed(0)
    model = Long().double()
    batch = {"input_ids": torch.randint(0, 40, (3, length)), "labels": torch.tensor([0, 1, 2])}
    expected, _, norms = clipped("reference", model, batch, 0.05)
    for dtype in (torch.float64, torch.float32):
        found, _, norms2 = clipped("factored", model.to(dtype), batch, 0.05)
        tolerance = 1e-10 if dtype is torch.float64 else 1e-5
        assert torch.allclose(norms, norms2, rtol=tolerance)
        assert_same({n: t.double() for n, t in found.items()}, expected, tolerance)


def test_the_check_before_a_run_sees_through_a_head_of_zeros():
    """With all logits zero nothing flows into the body, and a layer that mixes examples would pass unseen."""

    class Mixing(nn.Module):
        def __init__(self, mixes):
            super().__init__()
            self.embed, self.out, self.mixes = nn.Embedding(9, 4), nn.Linear(4, 3), mixes
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

        def forward(self, input_ids):
            hidden = self.embed(input_ids).mean(1)
            return self.out(hidden - hidden.mean(0) if self.mixes else hidden)

    batch = {"input_ids": torch.randint(0, 9, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    for mixes in (False, True):
        model = Mixing(mixes)
        engine = engine_class("factored")(model, loss, dict(model.named_parameters()), no_clock)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(CannotRun, match="mixes examples") if mixes else contextlib.nullcontext():
            check(engine, batch, {})
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

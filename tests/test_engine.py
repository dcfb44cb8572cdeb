"""The engines against per-example autograd in float64: clipped sums, norms, encodings, and what must raise."""

import contextlib

import pytest
import torch
import transformers as hf
from torch import nn

from dpft.harness.engine import NAMES, engine_class
from dpft.harness.engine.base import clip_factors, zero_sums
from dpft.harness.engine.encoding import Encoding
from dpft.harness.errors import BadInput, CannotRun

SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CONFIGS = {
    "bert": hf.BertConfig(**SMALL, max_position_embeddings=20),
    "roberta": hf.RobertaConfig(**SMALL, max_position_embeddings=24, pad_token_id=1),
    "electra": hf.ElectraConfig(**SMALL, embedding_size=12, max_position_embeddings=20),
    "distilbert": hf.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20
    ),
    "vit": hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    ),
}


def no_clock(phase):
    return contextlib.nullcontext()


class Classifier(nn.Module):
    """An encoder without pooler, mean pooling, and a head with random weights."""

    def __init__(self, config):
        super().__init__()
        config.attn_implementation = "eager"
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        with_pooler = config.model_type in ("bert", "roberta", "vit")
        self.encoder = hf.AutoModel.from_config(config, **({"add_pooling_layer": False} if with_pooler else {}))
        self.head = nn.Linear(16, 3)

    def forward(self, attention_mask=None, **inputs):
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        hidden = self.encoder(**inputs).last_hidden_state
        mask = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        return self.head(
            (hidden * mask[..., None].to(hidden.dtype)).sum(1) / mask.sum(1, keepdim=True).to(hidden.dtype)
        )


def loss(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return nn.functional.cross_entropy(model(**inputs), batch["labels"], reduction="none")


def batch_for(kind, size=5, length=9):
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (size,))
    if kind == "vit":
        return {"pixel_values": torch.randn(size, 3, 8, 8, dtype=torch.float64), "labels": labels}
    ids = torch.randint(5, 50, (size, length))
    mask = torch.ones(size, length, dtype=torch.long)
    for i in range(size):  # padding on the right, a different amount in each row
        mask[i, length - i :] = 0
        ids[i, length - i :] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if kind != "roberta":
        batch["position_ids"] = torch.arange(length).expand(size, length).contiguous()
    return batch


def clipped(name, model, batch, clip_norm=0.5, encodings=None, parameters=None, loss=loss):
    parameters = parameters or {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class(name)(model, loss, parameters, no_clock)
    total = zero_sums(parameters, encodings or {})
    try:
        losses, norms = engine.accumulate(batch, total, clip_norm, encodings or {})
    finally:
        engine.close()
    return total, losses, norms


def assert_same(found, expected, tolerance):
    for name in expected:
        scale = max(float(expected[name].norm()), 1e-3)
        assert float((found[name] - expected[name]).norm()) <= tolerance * scale, name


def model_for(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return Classifier(CONFIGS[kind]).to(dtype)


@pytest.mark.parametrize("kind", CONFIGS)
def test_factored_equals_per_example_autograd(kind):
    model, batch = model_for(kind), batch_for(kind)
    expected, losses, norms = clipped("reference", model, batch)
    if kind == "vit":  # position embeddings and class token are parameters without a layer: no rule yet
        with pytest.raises(CannotRun, match="embeddings"):
            clipped("factored", model, batch)
        for n, p in model.named_parameters():
            p.requires_grad_("embeddings" not in n or "projection" in n)
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
    assert torch.equal((na != nb).nonzero().flatten(), torch.tensor([2]))
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
    assert torch.allclose(norms, by_hand, rtol=1e-10)
    for factor, grads in zip(clip_factors(by_hand, 0.05), rows, strict=True):
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

    def __init__(self):
        super().__init__()
        self.embed, self.position, self.out = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.out((self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1])[None])).mean(1))


def test_a_layer_that_mixes_examples_raises():
    batch = {"input_ids": torch.randint(0, 9, (3, 5)), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(CannotRun, match="position sees 1 rows for 3 examples"):
        clipped("factored", Broadcast(), batch)


def test_layers_without_a_rule_are_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale

    class Net(nn.Module):
        def __init__(self, middle):
            super().__init__()
            self.embed, self.middle, self.out = nn.Embedding(9, 4), middle, nn.Linear(4, 3)

        def forward(self, input_ids):
            return self.out(self.middle(self.embed(input_ids).mean(1)))

    batch = {"input_ids": torch.randint(0, 9, (3, 5)), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(CannotRun, match=r"Layer middle \(Scale\) has no per-example gradient rule"):
        clipped("factored", Net(Scale()), batch)
    with pytest.raises(CannotRun, match="Layer middle is a BatchNorm"):
        clipped("factored", Net(nn.BatchNorm1d(4)), batch)


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

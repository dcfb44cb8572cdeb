"""Layers that see windows, chunks, the sequence first, chosen tokens or no example at all, against autograd in float64."""

import pytest
import torch
import transformers as hf
from engine_cases import (
    BODY,
    NO_DROPOUT,
    VOCABULARY,
    built,
    check,
    classification_loss,
    clipped,
    no_clock,
    randomised,
    text_batch,
)
from net_cases import WIDTH, Function, batch_of, loss, net_of
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.engine.layouts import Layout, layouts, to_front
from dpft.harness.errors import CannotRun

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = dict(**BODY, vocab_size=VOCABULARY, max_position_embeddings=16)
T5 = dict(vocab_size=VOCABULARY, d_model=12, d_kv=6, d_ff=20, num_heads=2, dropout_rate=0.0)
MOE = dict(num_key_value_heads=2, num_experts_per_tok=2, experts_implementation="eager", pad_token_id=0)
WINDOWS = dict(image_size=8, patch_size=2, num_channels=3, embed_dim=4, depths=[2], num_heads=[2], window_size=2)
ENCODERS = {
    "longformer": hf.LongformerConfig(
        **TEXT, **NO_DROPOUT, attention_window=4, pad_token_id=0
    ),  # sequence first, chunks
    "deberta": hf.DebertaConfig(  # one table of relative positions for all, in a layer of its own
        **TEXT, **NO_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    ),
    "mixtral": hf.MixtralConfig(**TEXT, **MOE, num_local_experts=3, head_dim=6),  # experts choose their tokens
    "funnel": hf.FunnelConfig(  # attention with parameters of its own, and positions that all share
        vocab_size=VOCABULARY,
        d_model=12,
        block_sizes=[1, 1],
        n_head=2,
        d_head=6,
        d_inner=20,
        hidden_dropout=0,
        attention_dropout=0,
        activation_dropout=0,
    ),  # fmt: skip
    "qwen2-moe": hf.Qwen2MoeConfig(
        **TEXT, **MOE, num_experts=3, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
}
SHAPES = {"3x8": (3, 8), "4x4": (4, 4)}


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_text_models(kind, size, length):
    model = built(hf.AutoModelForSequenceClassification, ENCODERS[kind])
    check(model, classification_loss, {**text_batch(size, length), "labels": torch.arange(size) % 2})


def first_token_loss(model, batch):
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return F.cross_entropy(hidden[:, 0, :2], batch["labels"], reduction="none")


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["t5", "switch"])
def test_relative_positions_of_t5_and_experts_with_a_capacity(kind, size, length):
    if kind == "t5":
        model = hf.T5EncoderModel(hf.T5Config(**T5, num_layers=1))
    else:
        sparse = dict(num_experts=3, expert_capacity=2, num_sparse_encoder_steps=1, router_jitter_noise=0.0)
        model = hf.SwitchTransformersEncoderModel(hf.SwitchTransformersConfig(**T5, **sparse, num_layers=1))
    check(randomised(model), first_token_loss, {**text_batch(size, length), "labels": torch.arange(size) % 2})


@pytest.mark.parametrize("config", [hf.SwinConfig(**WINDOWS), hf.Swinv2Config(**WINDOWS)], ids=["swin", "swinv2"])
def test_windows(config):
    config.drop_path_rate = 0.0
    torch.manual_seed(1)
    batch = {"pixel_values": torch.randn(4, 3, 8, 8, dtype=torch.float64), "labels": torch.arange(4) % 2}
    check(built(hf.AutoModelForImageClassification, config), classification_loss, batch)


def masked(self, x):
    """Causal, and some keys are padding of some examples."""
    causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
    padding = (x[..., 0] > 0) & (torch.arange(x.shape[1]) > 0)
    return self.layer(x, x, x, attn_mask=causal, key_padding_mask=padding)[0]


def by_states(self, x):
    """The state counts examples in its second dimension."""
    state = self.start(x[:, 0]).view(len(x), 2, WIDTH).transpose(0, 1).contiguous()
    out, last = self.layer(x, state)
    return out[..., :WIDTH] + last.sum(0)[:, None]


def sequence_first(self, x):
    out, (hidden, cell) = self.layer(x.transpose(0, 1))
    return out.transpose(0, 1) + hidden[-1][:, None] * cell[0][:, None]


class Pair(nn.Module):
    """A parameter of its own, and two outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return x * self.weight, x


LAYERS = {
    "attention": lambda: Function(masked, layer=nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "attention-with-weights": lambda: Function(
        lambda self, x: torch.matmul(*self.layer(x, x, x)[::-1]),
        layer=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    ),
    "attention-sequence-first": lambda: Function(
        lambda self, x: self.layer(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), layer=nn.MultiheadAttention(WIDTH, 2)
    ),
    "gru-with-states": lambda: Function(
        by_states,
        start=nn.Linear(WIDTH, 2 * WIDTH),
        layer=nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True),
    ),
    "lstm-sequence-first": lambda: Function(sequence_first, layer=nn.LSTM(WIDTH, WIDTH, num_layers=2)),
    "rnn": lambda: Function(lambda self, x: self.layer(x)[0], layer=nn.RNN(WIDTH, WIDTH, batch_first=True)),
    "two-outputs": lambda: Function(lambda self, x: sum(self.layer(x)), layer=Pair()),
    "transformer-layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("size, length", [(3, 5), (4, 4), (1, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_several_outputs(name, size, length):
    check(net_of(LAYERS[name]), loss, batch_of(size, length))


@pytest.mark.parametrize("name", ["attention", "gru-with-states", "two-outputs"])
def test_opacus_says_in_a_sentence_that_it_takes_no_layer_of_several_outputs(name):
    with pytest.raises(CannotRun, match="--engine.*reference"):
        clipped("opacus", net_of(LAYERS[name]), batch_of(3, 5), 0.1, loss=loss)


def test_a_pass_with_one_example_and_then_one_with_several():
    """Of the first alone nothing can be found out about the company of others; it is found out again."""
    torch.manual_seed(0)
    model = built(hf.AutoModelForSequenceClassification, ENCODERS["mixtral"])
    batch = {**text_batch(4, 6), "labels": torch.arange(4) % 2}
    parameters = dict(model.named_parameters())
    engine = engine_class("factored")(model, classification_loss, parameters, no_clock)
    engine.accumulate({k: v[:1] for k, v in batch.items()}, zero_sums(parameters, {}), 1.0, {})
    total = zero_sums(parameters, {})
    norms = engine.accumulate(batch, total, 1.0, {})[1]
    engine.close()
    expected, _, expected_norms = clipped("reference", model, batch, 1.0, loss=classification_loss)
    assert torch.allclose(norms, expected_norms, rtol=1e-10)
    assert all(torch.allclose(total[n], v, rtol=1e-8, atol=1e-12) for n, v in expected.items())


class Capacity(nn.Module):
    """An expert that takes the first rows of the batch only: examples compete for it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        flat = x.flatten(0, 1)
        return torch.cat([self.layer(flat[:7]), flat[7:]]).unflatten(0, x.shape[:2])


def test_experts_whose_capacity_the_batch_shares_are_refused():
    with pytest.raises(CannotRun, match="alone"):
        clipped("factored", net_of(Capacity), batch_of(4, 5), 0.1, loss=loss)


def test_layouts():
    net = net_of(LAYERS["lstm-sequence-first"])
    found = layouts(net, batch_of(3, 5), lambda batch: loss(net, batch))
    assert found["middle"] == found["out"] == found["embed"] == [Layout((0,), (0,))]
    assert found["middle.layer"] == [Layout((1,), (1, 1, 1))]
    assert set(found) == {"", "embed", "middle", "middle.layer", "out"}


@pytest.mark.parametrize("dim, shape", [(0, (3, 2)), (0, (6, 2)), (1, (2, 3)), (1, (2, 6))])
def test_rows_are_brought_to_the_front(dim, shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    front = to_front(tensor, dim, 3)
    own = tensor.tensor_split(3, dim)
    assert len(front) == 3 and all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(front, own, strict=True))

"""The factored engine on whole models, every parameter trainable, against per-example autograd in float64."""

import pytest
import torch
import transformers as hf
from engine_cases import (
    BODY,
    LENGTH,
    NO_DROPOUT,
    VOCABULARY,
    WIDTH,
    built,
    check,
    classification_loss,
    no_clock,
    randomised,
    text_batch,
)
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums

TEXT = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
ENCODERS = {
    "bert": hf.BertConfig(**BODY, **TEXT, **NO_DROPOUT),
    "roberta": hf.RobertaConfig(**BODY, **NO_DROPOUT, vocab_size=VOCABULARY, max_position_embeddings=LENGTH + 2),
    "electra": hf.ElectraConfig(**BODY, **TEXT, **NO_DROPOUT, embedding_size=8),
    "distilbert": hf.DistilBertConfig(
        **TEXT,
        dim=WIDTH,
        n_layers=2,
        n_heads=2,
        hidden_dim=20,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0,
    ),
}
OPT = dict(**TEXT, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, ffn_dim=20, dropout=0.0)
LLAMA = dict(**BODY, **TEXT, num_key_value_heads=1)
LANGUAGE_MODELS = {
    "bert-mlm": hf.BertConfig(**BODY, **TEXT, **NO_DROPOUT),
    "gpt2": hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "opt": hf.OPTConfig(**OPT, word_embed_proj_dim=WIDTH),
    "opt-projected": hf.OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "llama": hf.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": hf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(**LLAMA, tie_word_embeddings=False),
    "qwen3": hf.Qwen3Config(**LLAMA, head_dim=6, tie_word_embeddings=True),
    "gemma": hf.GemmaConfig(**LLAMA, head_dim=6),
}
IMAGE = dict(**BODY, **NO_DROPOUT, image_size=8, patch_size=4, num_channels=3)
IMAGE_MODELS = {
    "vit": hf.ViTConfig(**IMAGE),
    "deit": hf.DeiTConfig(**IMAGE, architectures=["DeiTForImageClassification"]),
    "convnext": hf.ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 2], num_stages=2, patch_size=2, drop_path_rate=0.0),
}
# Gemma computes its norm in fp32 whatever the model's type, the gradient of the weight included.
TOLERANCE = {"gemma": 2e-6}
SHAPES = {"3x7": (3, 7), "5x5": (5, 5), "1x4": (1, 4), "4x1": (4, 1)}  # batch x length, also coinciding ones
ATTENTION = ["eager", "sdpa"]


pytestmark = pytest.mark.usefixtures("one_thread")


def token_loss(model, batch, reduction="mean"):
    """Cross-entropy of an example's tokens that are not padding, averaged or summed over that example alone."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    losses = F.cross_entropy(model(**inputs).logits.mT, batch["labels"], reduction="none") * batch["attention_mask"]
    return losses.sum(1) / batch["attention_mask"].sum(1) if reduction == "mean" else losses.sum(1)


def summed_token_loss(model, batch):
    return token_loss(model, batch, "sum")


def token_batch(size, length, padding="right", pad=0):
    batch = text_batch(size, length, padding, pad)
    return {**batch, "labels": torch.randint(0, VOCABULARY, (size, length))}


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", ["looked-up-once", "given"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders(kind, positions, attention, size, length):
    """Without position_ids the positions have a leading dimension of 1 (BERT, ELECTRA, DistilBERT) and are broadcast."""
    model = built(hf.AutoModelForSequenceClassification, ENCODERS[kind], attention)
    batch = {**text_batch(size, length, pad=model.config.pad_token_id), "labels": torch.arange(size) % 2}
    if positions == "given":
        batch["position_ids"] = (torch.arange(length) + (2 if kind == "roberta" else 0)).repeat(size, 1)
    check(model, classification_loss, batch)


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models(kind, size, length):
    auto = hf.AutoModelForMaskedLM if kind == "bert-mlm" else hf.AutoModelForCausalLM
    model = built(auto, LANGUAGE_MODELS[kind], ATTENTION[size % 2])
    loss = summed_token_loss if size == length else token_loss
    check(model, loss, token_batch(size, length), TOLERANCE.get(kind, 1e-10))


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "opt-projected", "llama"])
def test_padding_on_either_side(kind, padding):
    """OPT looks its positions up by the attention mask: each row has its own."""
    model = built(hf.AutoModelForCausalLM, LANGUAGE_MODELS[kind], "sdpa")  # in float64 eager makes NaN of masked rows
    check(model, token_loss, token_batch(4, 6, padding, pad=1))


@pytest.mark.parametrize("size", [1, 3, 5, 6])
@pytest.mark.parametrize(
    "kind, attention", [("vit", "eager"), ("vit", "sdpa"), ("deit", "eager"), ("deit", "sdpa"), ("convnext", "eager")]
)
def test_image_models(kind, attention, size):
    """ViT has 5 tokens and DeiT 6: class (and distillation) token and position embeddings have no layer of their own."""
    model = built(hf.AutoModelForImageClassification, IMAGE_MODELS[kind], attention)
    check(model, classification_loss, image_batch(size))


@pytest.mark.parametrize("size, length", [(3, 7), (5, 5), (1, 4)])
@pytest.mark.parametrize("absolute", [True, False], ids=["positions-in-input", "relative-alone"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-keys", "own-keys"])
def test_relative_positions_of_deberta(shared, absolute, size, length):
    model = deberta(shared, absolute)
    check(model, classification_loss, {**text_batch(size, length), "labels": torch.arange(size) % 2})


def deberta(shared, absolute):
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, share_att_key=shared)
    more = dict(position_biased_input=absolute, type_vocab_size=0 if shared else 2, pad_token_id=0)
    more |= dict(norm_rel_ebd="layer_norm" if shared else "none", conv_kernel_size=0 if shared else 3)
    config = hf.DebertaV2Config(**BODY, **TEXT, **NO_DROPOUT, **relative, **more)
    return built(hf.AutoModelForSequenceClassification, config)


def test_relative_positions_with_checkpoints():
    model = deberta(True, False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, classification_loss, {**text_batch(3, 7), "labels": torch.arange(3) % 2})


def test_relative_positions_are_each_examples_own_only_while_gradients_are_taken():
    model, batch = deberta(True, False), {**text_batch(3, 7), "labels": torch.arange(3) % 2}
    seen = []
    model.deberta.encoder.layer[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["rel_embeddings"].dim()), with_kwargs=True
    )
    parameters = dict(model.named_parameters())
    engine = engine_class("factored")(model, classification_loss, parameters, no_clock)
    engine.accumulate(batch, zero_sums(parameters, {}), 1.0, {})
    assert set(seen[:3]) == {3}  # both looks for layouts, and the pass
    seen.clear()
    before = classification_loss(model, batch)
    engine.close()
    assert torch.equal(before, classification_loss(model, batch)) and seen == [2, 2]


def image_batch(size):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(size, 3, 8, 8, dtype=torch.float64), "labels": torch.arange(size) % 2}


class ResidualBlock(nn.Module):
    """Grouped and depthwise convolutions with GroupNorm and in-place ReLU; the shortcut is a strided 1x1 convolution."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, groups=2, bias=False),
            nn.GroupNorm(2, out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=2, dilation=2, groups=out),
            nn.GroupNorm(out, out),
        )
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        return F.relu_(self.body(x) + self.shortcut(x))


class ConvNeXtBlock(nn.Module):
    """LayerNorm with channels last, and a raw parameter that scales the branch by channel."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.inner, self.outer = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.layer_scale = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        branch = self.layer_scale * self.outer(F.gelu(self.inner(branch)))
        return x + branch.permute(0, 3, 1, 2)


class ConvolutionalNet(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.GroupNorm(1, 4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values):
        hidden = self.blocks(self.stem(pixel_values))
        return hf.modeling_outputs.ImageClassifierOutput(logits=self.head(hidden.mean((2, 3))))


@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("kind", ["resnet", "convnext-block"])
def test_convolutional_nets(kind, size):
    torch.manual_seed(
        1
    )  # of 0, a bias before a norm cancels from numbers so large that on an Intel its rounding is 1.2e-10
    blocks = [ResidualBlock(4, 6, 2), ResidualBlock(6, 4, 1)] if kind == "resnet" else [ConvNeXtBlock(4)]
    check(randomised(ConvolutionalNet(*blocks)), classification_loss, image_batch(size))

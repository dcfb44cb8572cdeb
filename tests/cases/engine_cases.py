"""Small models, batches and comparisons that the tests of the engines share."""

import contextlib

import torch
import transformers as hf
from torch import nn

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums

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


def clipped(
    name, model, batch, clip_norm=0.5, encodings=None, parameters=None, loss=loss, clipping=None, clock=no_clock
):
    parameters = parameters or {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class(name)(model, loss, parameters, clock, clipping)
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


def check(model, loss, batch, tolerance=1e-10):
    """Norms and every parameter's clipped sum; about half of the examples are clipped."""
    *_, norms = clipped("reference", model, batch, 1.0, loss=loss)
    clip_norm = 0.9 * float(norms.median())
    expected, losses, norms = clipped("reference", model, batch, clip_norm, loss=loss)
    found, found_losses, found_norms = clipped("factored", model, batch, clip_norm, loss=loss)
    assert torch.allclose(found_losses, losses, rtol=max(tolerance, 1e-12))
    assert torch.allclose(found_norms, norms, rtol=tolerance, atol=0)
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        # a gradient that is zero in exact arithmetic (the bias of a key) is rounding: measured against the largest
        scale = max(float(value.norm()), 1e-4 * largest)
        assert float((found[name] - value).norm()) <= tolerance * scale, name


# --- classifiers of transformers' own classes, every parameter moved off its initial value

VOCABULARY, WIDTH, LENGTH = 23, 12, 10
BODY = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def randomised(model):
    """The model in float64 with every parameter moved off its initial value, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def built(auto, config, attention="eager"):
    return randomised(auto.from_config(config, attn_implementation=attention))


def classification_loss(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def text_batch(size, length, padding="right", pad=0):
    """Random tokens, many of them equal; row i has i tokens of padding (one token at least is none)."""
    torch.manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (size, length))
    ids[:, 2::2] = ids[:, :1]
    mask = torch.ones(size, length, dtype=torch.long)
    for i in range(size):
        count = min(i, length - 1)
        padded = {"right": slice(length - count, length), "left": slice(0, count), "none": slice(0, 0)}[padding]
        ids[i, padded], mask[i, padded] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}

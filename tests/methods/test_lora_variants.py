"""LoRA+, DoRA and VeRA: PEFT's own models, one example at a time in float64, say what the gradients must be.

Models are in training mode, without dropout: Opacus's hooks do nothing in the other one.
"""

import pytest
import torch
import transformers as hf
from engine_cases import clipped, no_clock
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.methods.lora_variants import DoRA
from dpft.methods.targets import attention_projections

SMALL = dict(vocab_size=23, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
CONFIGS = {
    "bert": lambda: hf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=23, n_positions=10, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=10),
}
OPTIONS = {"lora-plus": {"rank": 3}, "dora": {"rank": 3, "alpha": 5}, "vera": {"rank": 7}}

pytestmark = pytest.mark.usefixtures("one_thread")


def base(kind):
    torch.manual_seed(0)
    auto = hf.AutoModelForSequenceClassification if kind == "bert" else hf.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[kind]())
    model.head_parameters = ["classifier.weight", "classifier.bias"] if kind == "bert" else []
    return model


def method_of(name):
    return registry.instance(resolve({"task": "sst2", "method": name, **OPTIONS[name]}))


def prepared(name, kind):
    """A model as the method trains it, away from its start, in float64."""
    model = method_of(name).prepare(base(kind), torch.Generator().manual_seed(2)).double().train()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn_like(p))
    return model


def injected(config, kind):
    return get_peft_model(base(kind), config).base_model.model


def peft_twin(name, kind, model):
    """(the same model by PEFT's own layers, by the names of `model` the parameters there)."""
    common = dict(target_modules=attention_projections(base(kind)), fan_in_fan_out=kind == "gpt2")
    if name == "vera":
        config = VeraConfig(r=7, save_projection=True, **common)
    else:
        config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, use_dora=name == "dora", **common)
    twin = injected(config, kind).double().train()
    theirs = dict(twin.named_parameters())
    renames = {
        "lora_magnitude_vector.default.scale.weight": "lora_magnitude_vector.default.weight",
        "lora_A.default.scale.weight": "vera_lambda_d.default",
        "lora_B.default.scale.weight": "vera_lambda_b.default",
    }
    names = {}
    for own, p in model.named_parameters():
        if p.requires_grad:
            other = own
            for ours, peft in renames.items():
                other = other.replace(ours, peft)
            names[own] = theirs[other]
            theirs[other].requires_grad_().data.copy_(p.data)
    if name == "vera":
        copy_shared(model, twin)
    return twin, names


def copy_shared(model, twin):
    """VeRA's frozen matrices: of other layers' sizes a corner of the largest."""
    adapters = [m for m in model.modules() if "lora_A" in dict(m.named_children())]
    layers = [m for m in twin.modules() if "vera_lambda_b" in dict(m.named_children())]
    assert len(adapters) == len(layers) > 0
    for ours, theirs in zip(adapters, layers, strict=True):
        a, b = ours.lora_A["default"].weight, ours.lora_B["default"].weight
        theirs.vera_A["default"][:, : a.shape[1]] = a.data
        theirs.vera_B["default"][: b.shape[0]] = b.data


def batch_of(size=4, length=5):
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(2, 23, (size, length)),
        "position_ids": torch.arange(length).repeat(size, 1),
        "labels": torch.randint(0, 23, (size, length)),
    }


def loss(model, batch):
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, batch["labels"][:, 0] % 2, reduction="none")
    return F.cross_entropy(logits.mT, batch["labels"], reduction="none").mean(1)


def one_by_one(twin, names, batch, clip_norm):
    """(clipped sum, norms) of per-example autograd on PEFT's model."""
    total, norms = {own: torch.zeros_like(p) for own, p in names.items()}, []
    for i in range(len(batch["labels"])):
        found = torch.autograd.grad(loss(twin, {k: v[i : i + 1] for k, v in batch.items()})[0], list(names.values()))
        norms.append(sum(g.square().sum() for g in found).sqrt())
        for own, g in zip(names, found, strict=True):
            total[own] += g * min(1.0, clip_norm / float(norms[-1]))
    return total, torch.stack(norms)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["dora", "vera"])
def test_every_engine_clips_the_gradients_of_pefts_model_taken_one_example_at_a_time(name, kind):
    model, batch = prepared(name, kind), batch_of()
    twin, names = peft_twin(name, kind, model)
    assert torch.allclose(loss(model, batch), loss(twin, batch), rtol=1e-12)
    _, norms = one_by_one(twin, names, batch, 1.0)
    clip_norm = 1.001 * float(norms.median())
    expected, norms = one_by_one(twin, names, batch, clip_norm)
    assert 0 < int((norms > clip_norm).sum()) < len(norms)
    largest = max(float(value.norm()) for value in expected.values())
    for engine in ("factored", "reference", "opacus"):
        found, _, found_norms = clipped(engine, model, batch, clip_norm, loss=loss)
        assert found.keys() == expected.keys()
        assert torch.allclose(found_norms[:, 0], norms, rtol=1e-9)
        for own, value in expected.items():
            assert float((found[own] - value).norm()) <= 1e-9 * max(float(value.norm()), 1e-4 * largest), (engine, own)
    sized_like_the_width = {k: v.repeat(3, 1) for k, v in batch.items()}  # 12 examples, 12 inputs of a layer
    once, thrice = (clipped("factored", model, b, clip_norm, loss=loss)[0] for b in (batch, sized_like_the_width))
    for own, value in once.items():
        assert torch.allclose(thrice[own], 3 * value, rtol=1e-8, atol=1e-10 * largest)


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_microbatches_and_an_empty_batch(name):
    model, batch = prepared(name, "bert"), batch_of()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class("factored")(model, loss, parameters, no_clock)
    whole, pieces = zero_sums(parameters, {}), zero_sums(parameters, {})
    engine.accumulate(batch, whole, 0.5, {})
    for part in (slice(0, 1), slice(1, 4)):
        engine.accumulate({k: v[part] for k, v in batch.items()}, pieces, 0.5, {})
    engine.close()
    assert all(torch.allclose(pieces[n], whole[n], rtol=1e-10, atol=1e-13) for n in parameters)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fresh_adapter_changes_nothing(name):
    plain, model = base("bert").eval(), method_of(name).prepare(base("bert"), torch.Generator().manual_seed(2)).eval()
    assert torch.allclose(loss(model, batch_of()), loss(plain, batch_of()), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (LoraConfig(r=3, target_modules=["query"], use_dora=True), "lora_"),
        (VeraConfig(r=3, target_modules=["query"]), "vera_lambda"),
    ],
    ids=["dora", "vera"],
)
def test_pefts_own_is_right_by_the_layer_around(config, own):
    """DoRA sends the identity through LoRA's layers, VeRA's vectors lie outside of any: the layer around tells examples apart."""
    sums = []
    for engine in ("factored", "reference"):
        torch.manual_seed(0)
        model = injected(config, "bert")
        for name, p in model.named_parameters():
            p.requires_grad_(own in name)
        sums.append(clipped(engine, model, batch_of(), loss=loss))
    (one, *_), (other, *_) = sums
    assert one.keys() == other.keys() and any(value.abs().max() > 0 for value in one.values())
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-8, atol=1e-10), name


def test_dora_s_norm_is_a_constant_and_its_magnitude_the_norm_at_the_start():
    model = method_of("dora").prepare(base("bert"), torch.Generator().manual_seed(2))
    layer = model.bert.encoder.layer[0].attention.self.query
    assert torch.allclose(layer.lora_magnitude_vector["default"].scale.weight, layer.base_layer.weight.norm(dim=1))
    layer = prepared("dora", "bert").bert.encoder.layer[0].attention.self.query
    a, b, m = (
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].scale.weight,
    )
    x = torch.randn(6, 12, dtype=torch.float64)
    whole = layer.base_layer.weight + 5 / 3 * b @ a
    expected = x @ (m[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()).T + layer.base_layer.bias
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    found = torch.autograd.grad(layer(x).square().sum(), [a, b, m])
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), [a, b, m]), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


def test_vera_trains_two_vectors_a_layer_and_shares_what_is_frozen():
    model = method_of("vera").prepare(base("llama"), torch.Generator().manual_seed(2))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 3 * 2 and set(shapes.values()) == {(7,), (12,), (6,)}
    frozen = {id(m.lora_A["default"].weight) for m in model.modules() if "lora_A" in dict(m.named_children())}
    assert len(frozen) == 1, "all inputs are 12 wide"
    drawn = next(m.lora_B["default"].weight for m in model.modules() if "lora_A" in dict(m.named_children()))
    assert float(drawn.abs().max()) <= (6 / 7) ** 0.5 and float(drawn.std()) == pytest.approx((2 / 7) ** 0.5, rel=0.2)
    other = method_of("vera").prepare(base("llama"), torch.Generator().manual_seed(3))
    assert not torch.equal(next(p for n, p in other.named_parameters() if n.endswith("lora_B.default.weight")), drawn)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_b_learns_at_its_own_rate_and_the_head_at_its(optimizer):
    method = method_of("lora-plus")
    model = method.prepare(base("bert"), torch.Generator().manual_seed(2))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    spec = resolve({"task": "sst2", "method": "lora-plus", "optimizer": optimizer, "momentum": 0.0})
    made = method.optimizer(parameters, frozenset(model.head_parameters), spec)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    for group in made.param_groups:
        group["lr"] = 1e-3 * group["lr_factor"]
    for p in parameters.values():
        p.grad = torch.full_like(p, 0.5)
    made.step()
    unit = 1e-3 * (0.5 if optimizer == "sgd" else 1.0)
    for n, p in parameters.items():
        factor = 16 if "lora_B" in n else 1 if "lora_A" in n else 90
        assert torch.allclose(before[n] - p, torch.full_like(p, unit * factor), rtol=1e-2, atol=1e-7), n
    assert sum("lora_B" in n for n in parameters) == 6 and "classifier.bias" in parameters


@pytest.mark.parametrize("name, option", [("lora-plus", "lr_ratio"), ("dora", "rank"), ("vera", "d_initial")])
def test_settings_that_cannot_work_are_refused(name, option):
    with pytest.raises(BadInput, match=option):
        resolve({"task": "sst2", "method": name, option: 0})


def test_rows_of_zeros_are_a_reason_to_skip():
    layers = nn.ModuleDict({"query": nn.Linear(6, 4), "key": nn.Linear(6, 4)})
    dora = DoRA({"targets": "value,query"})
    assert dora.skip(layers) is None
    with torch.no_grad():
        layers["query"].weight[2] = 0
    assert "a row of zeros has none" in dora.skip(layers)
    layers["query"].weight.requires_grad_(False)[2] = 1
    assert dora.skip(layers) is None

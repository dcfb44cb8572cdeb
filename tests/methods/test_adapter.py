"""Bottleneck adapters: where they go, where they start, and gradients against per-example autograd in float64."""

import copy

import causal_cases
import pytest
import torch
import transformers as hf
from engine_cases import CONFIGS, batch_for, clipped, model_for
from engine_cases import loss as encoder_loss
from torch.nn import functional as F

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.tasks import models

ENCODERS, DECODERS = ("bert", "roberta", "electra", "distilbert", "vit"), ("gpt2", "opt", "llama")

pytestmark = pytest.mark.usefixtures("one_thread")


def method(**options):
    return registry.make("adapter", "mean", {"rank": 5, **options})


def plain(kind):
    if kind in ENCODERS:
        model = model_for(kind)
        model.head_parameters = ["head.weight", "head.bias"]
        return model.train()
    config = copy.deepcopy(causal_cases.CONFIGS[kind])
    models.without_dropout(config)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).double().train()
    model.head_parameters = []
    return model


def loss(model, batch):
    if "labels" in batch:
        return encoder_loss(model, batch)
    ids = batch["input_ids"]
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


def batch_of(kind):
    torch.manual_seed(1)
    return batch_for(kind) if kind in ENCODERS else {"input_ids": torch.randint(3, 30, (4, 6))}


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_every_engine_clips_adapters_right_and_a_fresh_one_changes_little(kind):
    untouched, batch = plain(kind), batch_of(kind)
    model = method().prepare(plain(kind), torch.Generator().manual_seed(2)).double()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    blocks = model.config.num_hidden_layers if kind in DECODERS else model.encoder.config.num_hidden_layers
    assert len(names) == 2 * 4 * blocks + len(model.head_parameters), "behind attention and behind the MLP"
    assert set(model.head_parameters) <= names
    before, after = loss(untouched, batch), loss(model, batch)
    assert 0 < float((after - before).detach().abs().max()) < 1e-2
    torch.manual_seed(3)
    for n, p in model.named_parameters():
        if n in names:
            p.data.add_(0.3 * torch.randn_like(p))
    parameters = {n: p for n, p in model.named_parameters() if n in names}
    rows = len(next(iter(batch.values())))
    found = [
        torch.autograd.grad(loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0], list(parameters.values()))
        for i in range(rows)
    ]
    norms = torch.stack([sum(g.square().sum() for g in one).sqrt() for one in found])
    clip_norm = 1.001 * float(norms.median())
    for engine in ("factored", "reference", "opacus"):
        if (kind, engine) == ("opt", "opacus"):  # its MLP sees [batch * tokens, width]
            with pytest.raises(CannotRun, match="apart"):
                clipped(engine, model, batch, clip_norm, loss=loss)
            continue
        total, _, lengths = clipped(engine, model, batch, clip_norm, loss=loss)
        assert torch.allclose(lengths[:, 0], norms, rtol=1e-8)
        for j, name in enumerate(parameters):
            right = sum(one[j] * min(1.0, clip_norm / float(n)) for one, n in zip(found, norms, strict=True))
            assert float((total[name] - right).norm()) <= 1e-8 * float(right.norm()), (engine, name)


def test_an_adapter_adds_a_bottleneck_to_what_its_layer_gives_and_starts_in_a_narrow_range():
    model = method(rank=64).prepare(plain("bert"), torch.Generator().manual_seed(2)).double()
    adapted = model.encoder.encoder.layer[1].attention.output.dense
    x = torch.randn(7, 16, dtype=torch.float64)
    h = x @ adapted.layer.weight.T + adapted.layer.bias
    down, up = adapted.adapter_down, adapted.adapter_up
    inner = h @ down.weight.T + down.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    assert torch.allclose(adapted(x), h + inner @ up.weight.T + up.bias, rtol=1e-10)
    assert not down.bias.any() and not up.bias.any()
    for weight in (down.weight, up.weight):
        assert float(weight.abs().max()) <= 0.02 and float(weight.std()) == pytest.approx(0.0088, rel=0.1)
    again = method(rank=64).prepare(plain("bert"), torch.Generator().manual_seed(2)).double()
    other = method(rank=64).prepare(plain("bert"), torch.Generator().manual_seed(3)).double()
    first = [
        dict(m.named_parameters())["encoder.encoder.layer.0.output.dense.adapter_up.weight"] for m in (again, other)
    ]
    mine = model.encoder.encoder.layer[0].output.dense.adapter_up.weight
    assert torch.equal(mine, first[0]) and not torch.equal(mine, first[1])


def test_targets_of_ones_own_a_head_that_keeps_its_names_and_a_model_without_blocks():
    model = hf.RobertaForSequenceClassification(CONFIGS["roberta"])  # its head has a `classifier.dense`
    model.head_parameters = [n for n, _ in model.named_parameters() if n.startswith("classifier")]
    prepared = method(targets="query,dense").prepare(model, torch.Generator().manual_seed(2))
    trained = {n for n, p in prepared.named_parameters() if p.requires_grad}
    assert set(model.head_parameters) <= trained and not any("classifier.dense.adapter" in n for n in trained)
    assert any("self.query.adapter_up" in n for n in trained) and any(
        "intermediate.dense.adapter" in n for n in trained
    )
    assert "set `targets`" in method(targets="nothing_here").skip(model)
    with pytest.raises(BadInput, match="rank"):
        resolve({"task": "sst2", "method": "adapter", "rank": 0})

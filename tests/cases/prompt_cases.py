"""Models whose texts get trained vectors beside them (prompt, prefix), whole batches for them, and single examples."""

import copy

import causal_cases
import torch
import transformers as hf
from engine_cases import batch_for, clipped, model_for
from torch.nn import functional as F

from dpft.tasks import causal, models

ENCODERS = ("bert", "roberta", "electra", "distilbert")
DECODERS = ("gpt2", "opt", "llama-tied")


def encoder(kind):
    model = model_for(kind)
    model.head_parameters = ["head.weight", "head.bias"]
    return model.train()


def decoder(kind):
    torch.manual_seed(0)
    config = copy.deepcopy(causal_cases.CONFIGS[kind])
    models.without_dropout(config)
    inner = hf.AutoModelForCausalLM.from_config(config)
    for p in inner.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return causal.causal_model()(inner.double()).train()


def batch_of(kind):
    """Five or four texts of several lengths."""
    if kind in ENCODERS:
        return batch_for(kind)
    examples = [
        {"input_ids": torch.randint(4, 30, (n,)).numpy(), "prompt_length": start}
        for n, start in ((9, 3), (5, 2), (7, 1), (4, 3))
    ]
    return causal.Collator(0)(examples)


def built(kind, method):
    """(the model as `method` prepares it, one as it was)."""
    make = encoder if kind in ENCODERS else decoder
    model = make(kind)
    assert method.skip(model) is None
    return method.prepare(model, torch.Generator().manual_seed(1)).double(), make(kind)


def loss(model, batch):
    if "targets" in batch:
        return model(**batch) / (batch["targets"] >= 0).sum(1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs), batch["labels"], reduction="none")


def alone(batch, i):
    """Example i without any padding."""
    length = int(batch["attention_mask"][i].sum())
    wide = {"input_ids", "attention_mask", "position_ids"}
    return {k: v[i : i + 1, :length] if k in wide else v[i : i + 1] for k, v in batch.items()}


def check(model, plain, batch, names, hidden_by_hand):
    """Every engine's losses, norms and clipped sums, against autograd on one example after the other without any padding.

    names: what trains of the body. hidden_by_hand(its values, example): hidden states [1, length, width] of the text.
    """
    found = dict(model.named_parameters())
    head = [name for name in found if name.startswith("head.")]
    assert {name for name, p in found.items() if p.requires_grad} == {*names, *head}
    own, top = ([found[name].detach().clone().requires_grad_() for name in some] for some in (names, head))
    losses, gradients = [], []
    for i in range(len(batch["input_ids"])):
        example = alone(batch, i)
        hidden = hidden_by_hand(own, example)
        if head:
            losses.append(F.cross_entropy(F.linear(hidden.mean(1), *top), example["labels"]))
        else:
            start = int(example["target_positions"][0, 0])
            scores = plain.model.get_output_embeddings()(hidden[:, start:-1])
            losses.append(F.cross_entropy(scores[0], example["input_ids"][0, start + 1 :]))
        gradients.append(torch.autograd.grad(losses[-1], [*own, *top]))
    norms = torch.stack([sum(g.square().sum() for g in grads).sqrt() for grads in gradients])
    clip_norm = 1.001 * float(norms.median())
    for engine in ("factored", "reference", "opacus"):
        sums, found_losses, found_norms = clipped(engine, model, batch, clip_norm, loss=loss)
        assert torch.allclose(found_losses, torch.stack(losses).detach(), rtol=1e-9)
        assert torch.allclose(found_norms[:, 0], norms, rtol=1e-8)
        for j, name in enumerate([*names, *head]):
            right = sum(g[j] * min(1.0, clip_norm / float(n)) for g, n in zip(gradients, norms, strict=True))
            assert float((sums[name] - right).norm()) <= 1e-8 * float(right.norm()), (engine, name)

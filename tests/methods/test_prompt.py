"""Prompt tuning: against prompts put in front by hand, one example at a time in float64; padding, poolers, generation."""

import copy

import causal_cases
import pytest
import torch
import transformers as hf
from engine_cases import CONFIGS, batch_for, clipped, model_for
from torch.nn import functional as F

from dpft.harness.engine.base import zero_sums
from dpft.harness.runs import registry
from dpft.tasks import causal, models

ENCODERS = ("bert", "roberta", "electra", "distilbert")
DECODERS = ("gpt2", "opt", "llama-tied")
COUNT = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def method():
    return registry.make("prompt", "mean", {"tokens": COUNT})


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


def built(kind):
    """(model with prompts, one without, the same batch for both)."""
    make, plain = (encoder, encoder(kind)) if kind in ENCODERS else (decoder, decoder(kind))
    model = make(kind)
    assert method().skip(model) is None
    model = method().prepare(model, torch.Generator().manual_seed(1)).double()
    torch.manual_seed(3)
    model.encoder.prompt.weight.data.add_(0.5 * torch.randn_like(model.encoder.prompt.weight))
    if kind in ENCODERS:
        return model, plain, batch_for(kind)
    examples = [
        {"input_ids": torch.randint(4, 30, (n,)).numpy(), "prompt_length": start}
        for n, start in ((9, 3), (5, 2), (7, 1), (4, 3))
    ]
    return model, plain, causal.Collator(0)(examples)


def loss(model, batch):
    if "targets" in batch:
        return model(**batch) / (batch["targets"] >= 0).sum(1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs), batch["labels"], reduction="none")


def by_hand(kind, plain, prompt, example):
    """Hidden states [1, length, width] of the text of one example without padding, the prompt in front of it."""
    body, ids = plain.encoder, example["input_ids"]
    first = 2 if kind == "roberta" else 0
    places = torch.arange(ids.shape[1]) + first
    own = torch.full((COUNT,), first)
    if kind.startswith("llama"):
        places, own = places + COUNT, torch.arange(COUNT)
    embedded = torch.cat([prompt[None], body.get_input_embeddings()(ids)], 1)
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    out = body(inputs_embeds=embedded, attention_mask=mask, position_ids=torch.cat([own, places])[None])
    return out.last_hidden_state[:, COUNT:]


def loss_by_hand(kind, plain, prompt, head, example):
    hidden = by_hand(kind, plain, prompt, example)
    if kind in ENCODERS:
        return F.cross_entropy(F.linear(hidden.mean(1), *head), example["labels"])
    start = int(example["target_positions"][0, 0])
    scores = plain.model.get_output_embeddings()(hidden[:, start:-1])
    return F.cross_entropy(scores[0], example["input_ids"][0, start + 1 :])


def alone(batch, i):
    """Example i without any padding."""
    length = int(batch["attention_mask"][i].sum())
    wide = {"input_ids", "attention_mask", "position_ids"}
    return {k: v[i : i + 1, :length] if k in wide else v[i : i + 1] for k, v in batch.items()}


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_every_engine_clips_what_prompts_put_in_front_by_hand_have_for_gradients(kind):
    """The prompt is one parameter that all examples look up: it has as many gradients as there are examples."""
    model, plain, batch = built(kind)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    prompt = model.encoder.prompt.weight.detach().clone().requires_grad_()
    head = [p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n.startswith("head.")]
    assert [n.endswith("prompt.weight") for n in names].count(True) == 1 and len(names) == 1 + len(head)
    losses, gradients = [], []
    for i in range(len(batch["input_ids"])):
        losses.append(loss_by_hand(kind, plain, prompt, head, alone(batch, i)))
        gradients.append(torch.autograd.grad(losses[-1], [prompt, *head]))
    norms = torch.stack([sum(g.square().sum() for g in found).sqrt() for found in gradients])
    clip_norm = 1.001 * float(norms.median())
    expected = [
        sum(g[j] * min(1.0, clip_norm / float(n)) for g, n in zip(gradients, norms, strict=True))
        for j in range(len(names))
    ]
    for engine in ("factored", "reference", "opacus"):
        found, found_losses, found_norms = clipped(engine, model, batch, clip_norm, loss=loss)
        assert torch.allclose(found_losses, torch.stack(losses).detach(), rtol=1e-9)
        assert torch.allclose(found_norms[:, 0], norms, rtol=1e-8)
        for name, value in found.items():
            right = expected[0] if name.endswith("prompt.weight") else expected[1 + name.endswith("bias")]
            assert float((value - right).norm()) <= 1e-8 * float(right.norm()), (engine, name)


@pytest.mark.parametrize("kind", ["bert", "llama-tied"])
def test_microbatches_and_an_empty_one_change_nothing(kind):
    model, _, batch = built(kind)
    whole = clipped("factored", model, batch, 0.5, loss=loss)[0]
    added = zero_sums({n: p for n, p in model.named_parameters() if p.requires_grad}, {})
    for part in (slice(0, 1), slice(1, None)):
        for name, value in clipped("factored", model, {k: v[part] for k, v in batch.items()}, 0.5, loss=loss)[
            0
        ].items():
            added[name] += value
    assert all(torch.allclose(added[name], value, rtol=1e-9, atol=1e-14) for name, value in whole.items())


def test_a_pooler_still_reads_the_first_token_of_the_text():
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(CONFIGS["bert"]).double().eval()
    model.head_parameters = [n for n, _ in model.named_parameters() if n.startswith("classifier")]
    batch = batch_for("bert")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    plain = hf.BertForSequenceClassification(CONFIGS["bert"]).double().eval()
    plain.load_state_dict(model.state_dict())
    model = method().prepare(model, torch.Generator().manual_seed(1))
    plain.encoder = plain.bert
    hidden = by_hand("bert", plain, model.bert.prompt.weight, alone(batch, 2))
    expected = plain.classifier(torch.tanh(plain.bert.pooler.dense(hidden[:, 0])))
    assert torch.allclose(model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).logits[2:3], expected)


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_a_cache_writes_what_the_whole_text_would(kind):
    """Texts of several lengths, padded on the left, six new tokens."""
    model, plain, _ = built(kind)
    model.eval(), plain.eval()
    texts = [torch.randint(4, 30, (n,)) for n in (6, 2, 4)]
    rows = torch.stack([F.pad(t, (6 - len(t), 0)) for t in texts])
    mask = torch.stack([F.pad(torch.ones_like(t), (6 - len(t), 0)) for t in texts])
    settings = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=2, pad_token_id=0)
    found = model.model.generate(input_ids=rows, attention_mask=mask, **settings)[:, 6:]
    for text, written in zip(texts, found, strict=True):
        tokens = text[None]
        for _ in range(6):
            hidden = by_hand(kind, plain, model.encoder.prompt.weight, {"input_ids": tokens})
            scores = plain.model.get_output_embeddings()(hidden[:, -1])
            scores[:, 2] = -torch.inf  # the end of the text is not allowed yet
            tokens = torch.cat([tokens, scores.argmax(1, keepdim=True)], 1)
        assert written.tolist() == tokens[0, len(text) :].tolist()


def test_rows_start_as_words_of_the_vocabulary_that_the_generator_draws():
    model = method().prepare(encoder("bert"), torch.Generator().manual_seed(1))
    table, rows = model.encoder.get_input_embeddings().weight, model.encoder.prompt.weight
    assert all((table == row).all(1).any() for row in rows)
    other = method().prepare(encoder("bert"), torch.Generator().manual_seed(2)).encoder.prompt.weight
    assert not torch.equal(rows, other)
    rows.data.zero_()
    assert table.any(), "the prompt is no view of the table"


@pytest.mark.parametrize("kind, reason", [("vit", "no table"), ("deberta-v2", "order of tokens")])
def test_models_that_cannot_take_prompts_are_skipped_with_a_reason(kind, reason):
    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = CONFIGS["vit"] if kind == "vit" else hf.DebertaV2Config(**small, relative_attention=True)
    model = torch.nn.Module()
    model.encoder = hf.AutoModel.from_config(config)
    assert reason in method().skip(model)

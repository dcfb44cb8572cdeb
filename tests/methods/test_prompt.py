"""Prompt tuning: against prompts put in front by hand, one example at a time in float64; padding, poolers, generation."""

import prompt_cases
import pytest
import torch
import transformers as hf
from engine_cases import CONFIGS, batch_for, clipped
from prompt_cases import DECODERS, ENCODERS, alone, batch_of, encoder, loss
from small_runs import a_spec, quiet
from torch.nn import functional as F

from dpft.harness.engine.base import zero_sums
from dpft.harness.runs import registry
from dpft.harness.train import run

COUNT = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def method():
    return registry.make("prompt", "mean", {"tokens": COUNT})


def built(kind):
    """(model with prompts, one without, the same batch for both)."""
    model, plain = prompt_cases.built(kind, method())
    torch.manual_seed(3)
    model.encoder.prompt.weight.data.add_(0.5 * torch.randn_like(model.encoder.prompt.weight))
    return model, plain, batch_of(kind)


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


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_every_engine_clips_what_prompts_put_in_front_by_hand_have_for_gradients(kind):
    """The prompt is one parameter that all examples look up: it has as many gradients as there are examples."""
    model, plain, batch = built(kind)
    names = [name for name, _ in model.named_parameters() if name.endswith("prompt.weight")]
    prompt_cases.check(model, plain, batch, names, lambda own, one: by_hand(kind, plain, *own, one))


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


@pytest.mark.parametrize("head", ["native", "mlm"])
def test_a_run_with_another_head_passes_its_own_comparison_with_autograd(head, tiny_bert, settings):
    """Texts are up to 32 tokens long, all that this model has positions for: the prompt takes none away."""
    record, _ = run.execute(a_spec("prompt", tiny_bert, head=head, steps=1, eval_every=1), settings, quiet)
    assert record["status"] == "done", record["error"]


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


@pytest.mark.parametrize(
    "kind, reason", [("vit", "no table"), ("resnet", "no table"), ("deberta-v2", "order of tokens")]
)
def test_models_that_cannot_take_prompts_are_skipped_with_a_reason(kind, reason):
    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    configs = {"vit": CONFIGS["vit"], "resnet": hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])}
    config = configs.get(kind) or hf.DebertaV2Config(**small, relative_attention=True)
    model = torch.nn.Module()
    model.encoder = hf.AutoModel.from_config(config)
    assert reason in method().skip(model)

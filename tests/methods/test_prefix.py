"""Prefix tuning: against attention written out and against transformers' cache, one example at a time in float64."""

import copy

import prompt_cases
import pytest
import torch
import transformers as hf
from engine_cases import CONFIGS, batch_for, clipped
from prompt_cases import DECODERS, ENCODERS, batch_of, loss
from small_runs import a_spec, quiet
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface

from dpft.harness.engine.base import zero_sums
from dpft.harness.runs import registry
from dpft.harness.train import run
from dpft.methods.prefix import attention_layers

COUNT = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def method():
    return registry.make("prefix", "mean", {"tokens": COUNT})


def built(kind):
    """(model with prefixes that are not small, one without, names of the prefixes in the order of the layers)."""
    model, plain = prompt_cases.built(kind, method())
    names = [name for name, _ in model.named_parameters() if name.endswith("prefix.weight")]
    torch.manual_seed(3)
    for name in names:
        p = model.get_parameter(name)
        p.data.add_(0.5 * torch.randn_like(p))
    return model, plain, names


def halves(weights, layer):
    """Keys and values [1, heads, tokens, size] of the rows of a prefix."""
    heads = getattr(layer.config, "num_key_value_heads", None) or 2
    return [part.reshape(COUNT, heads, -1).transpose(0, 1)[None] for part in weights.chunk(2, 1)]


def written_out(plain, prefixes, example):
    """Hidden states [1, length, width] of one text of an encoder: softmax over prefix and text, as the formula has it."""
    layers = attention_layers(plain.encoder)
    joined = {id(layer): halves(weights, layer) for layer, weights in zip(layers, prefixes, strict=True)}

    def attend(layer, query, key, value, mask, scaling=None, **more):
        keys, values = (torch.cat(pair, 2) for pair in zip(joined[id(layer)], (key, value), strict=True))
        weights = (query @ keys.mT / query.shape[-1] ** 0.5).softmax(-1)
        return (weights @ values).transpose(1, 2), None

    AttentionInterface.register("written-out", attend)
    for layer in layers:
        layer.config = copy.deepcopy(layer.config)
        layer.config._attn_implementation = "written-out"
    inputs = {name: example[name] for name in ("input_ids", "attention_mask", "position_ids") if name in example}
    return plain.encoder(**inputs).last_hidden_state


def by_cache(plain, prefixes, ids):
    """The same of a decoder, with the prefix in transformers' own cache and the text at the positions that it always has."""
    cache, length = hf.DynamicCache(), ids.shape[1]
    for number, (layer, weights) in enumerate(zip(attention_layers(plain.encoder), prefixes, strict=True)):
        cache.update(*halves(weights, layer), number)
    mask = torch.ones(1, COUNT + length, dtype=torch.long)
    places = torch.arange(length)[None]
    return plain.encoder(ids, attention_mask=mask, position_ids=places, past_key_values=cache).last_hidden_state


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_every_engine_clips_what_prefixes_have_for_gradients_by_hand(kind):
    """A prefix is one parameter that all examples look up: it has as many gradients as there are examples."""
    model, plain, names = built(kind)
    assert len(names) == len(attention_layers(model.encoder)) == 2

    def hidden(own, example):
        return written_out(plain, own, example) if kind in ENCODERS else by_cache(plain, own, example["input_ids"])

    prompt_cases.check(model, plain, batch_of(kind), names, hidden)


@pytest.mark.parametrize("kind", ["bert", "llama-tied"])
def test_microbatches_change_nothing(kind):
    (model, *_), batch = built(kind), batch_of(kind)
    whole = clipped("factored", model, batch, 0.5, loss=loss)[0]
    added = zero_sums({n: p for n, p in model.named_parameters() if p.requires_grad}, {})
    for part in (slice(0, 1), slice(1, None)):
        piece = {name: tensor[part] for name, tensor in batch.items()}
        for name, value in clipped("factored", model, piece, 0.5, loss=loss)[0].items():
            added[name] += value
    assert all(torch.allclose(added[name], value, rtol=1e-9, atol=1e-14) for name, value in whole.items())


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_a_cache_writes_what_the_whole_text_would(kind):
    """Texts of several lengths, padded on the left, six new tokens; the cache holds the text alone."""
    model, plain, names = built(kind)
    model.eval(), plain.eval()
    prefixes = [model.get_parameter(name) for name in names]
    texts = [torch.randint(4, 30, (n,)) for n in (6, 2, 4)]
    rows = torch.stack([F.pad(t, (6 - len(t), 0)) for t in texts])
    mask = torch.stack([F.pad(torch.ones_like(t), (6 - len(t), 0)) for t in texts])
    settings = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=2, pad_token_id=0)
    found = model.model.generate(input_ids=rows, attention_mask=mask, **settings)[:, 6:]
    for text, written in zip(texts, found, strict=True):
        tokens = text[None]
        for _ in range(6):
            scores = plain.model.get_output_embeddings()(by_cache(plain, prefixes, tokens)[:, -1])
            scores[:, 2] = -torch.inf  # the end of the text is not allowed yet
            tokens = torch.cat([tokens, scores.argmax(1, keepdim=True)], 1)
        assert written.tolist() == tokens[0, len(text) :].tolist()


def test_prefixes_start_as_what_the_model_has_for_words_that_the_generator_draws():
    """Seen beside the text, they are the words: a text behind the same words has the same hidden states."""
    plain = prompt_cases.decoder("llama-tied")
    model = method().prepare(prompt_cases.decoder("llama-tied"), torch.Generator().manual_seed(1))
    words = torch.randint(plain.config.vocab_size, (1, COUNT), generator=torch.Generator().manual_seed(1))
    text = torch.randint(4, 30, (1, 5))
    places = torch.arange(COUNT, COUNT + 5)[None]
    beside = model.encoder(text, position_ids=places).last_hidden_state
    behind = plain.encoder(torch.cat([words, text], 1)).last_hidden_state[:, COUNT:]
    assert torch.allclose(beside, behind, rtol=1e-10)
    other = method().prepare(prompt_cases.decoder("llama-tied"), torch.Generator().manual_seed(2))
    assert not torch.equal(*(attention_layers(m.encoder)[0].prefix.weight for m in (model, other)))


def test_another_model_of_the_same_configuration_is_left_as_it_is():
    config, batch = copy.deepcopy(CONFIGS["bert"]), batch_for("bert")
    torch.manual_seed(0)
    plain, model = (hf.AutoModel.from_config(config).double() for _ in range(2))
    before = plain(batch["input_ids"]).last_hidden_state
    holder = torch.nn.Module()
    holder.encoder, holder.head_parameters = model, []
    method().prepare(holder, torch.Generator())
    assert torch.equal(plain(batch["input_ids"]).last_hidden_state, before)
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("head", ["native", "mlm"])
def test_a_run_with_another_head_passes_its_own_comparison_with_autograd(head, tiny_bert, settings):
    record, _ = run.execute(a_spec("prefix", tiny_bert, head=head, steps=1, eval_every=1), settings, quiet)
    assert record["status"] == "done", record["error"]


@pytest.mark.parametrize("kind, reason", [("vit", "no table"), ("deberta-v2", "has its own"), ("eager", "has its own")])
def test_models_that_cannot_take_prefixes_are_skipped_with_a_reason(kind, reason):
    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = copy.deepcopy(CONFIGS.get(kind, CONFIGS["bert"])) if kind != "deberta-v2" else hf.DebertaV2Config(**small)
    model = torch.nn.Module()
    model.encoder = hf.AutoModel.from_config(config, **({"attn_implementation": "eager"} if kind == "eager" else {}))
    assert reason in method().skip(model)

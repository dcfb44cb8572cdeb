"""Causal language models: the loss of target tokens in pieces, per-example gradients, padding, generation."""

import causal_cases
import pytest
import torch
from asking import encodings_of
from engine_cases import assert_same, clipped, no_clock
from torch.nn import functional

from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.errors import CannotRun
from dpft.harness.probes import Clock, LiveBytes
from dpft.harness.runs import registry
from dpft.tasks import causal, models
from dpft.tasks.base import Data, ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = list(causal_cases.CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    return lambda kind: made.setdefault(kind, causal_cases.save(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def prepared(folders):
    """kind -> (task, Prepared with its model in float64), the loss cut into pieces of a few positions."""
    task = registry.task("e2e")({"max_new_tokens": 12})
    rows = task.rows(causal_cases.polars.DataFrame(causal_cases.e2e_rows(24)), "rows")

    def make(kind, at_once=100):
        out = task.prepare(Data(rows[:12], rows, "x"), ModelSpec(folders(kind), "native", 40), torch.Generator())
        out.model.double()
        out.model.vocabulary.at_once = at_once
        return task, out

    return make


def plain_loss(model, batch):
    """The loss by transformers' own logits of every token."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    logits = model.model(**inputs, use_cache=False).logits
    index = batch["target_positions"][..., None].expand(-1, -1, logits.shape[-1])
    losses = functional.cross_entropy(logits.gather(1, index).mT, batch["targets"], reduction="none")
    return losses.sum(1) / (batch["targets"] != -100).sum(1)


@pytest.mark.parametrize("method", ["dp-adam", "dp-lora", "dp-grape"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_through_the_engine_equal_the_plain_loss(kind, method, prepared):
    task, out = prepared(kind)
    adapter = registry.make(method, "mean", {"rank": 4})
    model = adapter.prepare(out.model, torch.Generator().manual_seed(3)).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in parameters.values():
            if not p.any():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    encodings = encodings_of(adapter, parameters)
    assert (method == "dp-grape") == bool(encodings)
    batch = out.collate(out.train[:6])
    *_, norms = clipped("reference", model, batch, 1.0, encodings, parameters, plain_loss)
    bound = 0.9 * float(norms.median())
    expected, losses, norms = clipped("reference", model, batch, bound, encodings, parameters, plain_loss)
    for engine in ("factored", "reference"):
        sums, found_losses, found_norms = clipped(engine, model, batch, bound, encodings, parameters, task.loss)
        torch.testing.assert_close(found_losses, losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(found_norms, norms, rtol=1e-10, atol=0)
        assert_same(sums, expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_do_not_depend_on_padding_or_batch(kind, prepared):
    task, out = prepared(kind)
    assert len({len(e["input_ids"]) for e in out.train[:6]}) > 1, "the batch must need padding"
    together = out.collate(out.train[:6])
    longer = {k: functional.pad(v, (0, 5), value=-100 if k == "targets" else 0) for k, v in together.items()}
    parameters = dict(out.model.named_parameters())
    alone_sum = None
    alone_losses, alone_norms = [], []
    for example in out.train[:6]:
        total, losses, norms = clipped("reference", out.model, out.collate([example]), 0.5, loss=task.loss)
        alone_sum = total if alone_sum is None else {name: alone_sum[name] + total[name] for name in parameters}
        alone_losses.append(losses)
        alone_norms.append(norms)
    for batch in (together, longer):
        total, losses, norms = clipped("factored", out.model, batch, 0.5, loss=task.loss)
        torch.testing.assert_close(losses, torch.cat(alone_losses), rtol=1e-11, atol=0)
        torch.testing.assert_close(norms, torch.cat(alone_norms), rtol=1e-10, atol=0)
        assert_same(total, alone_sum, 1e-10)


def test_targets_are_the_response_and_the_end_of_text(prepared):
    task, out = prepared("llama")
    example, tokenizer = out.train[0], out.writing.encoder.tokenizer
    split = example["prompt_length"]
    assert tokenizer.decode(example["input_ids"][:split]) == "name : Blue Spice | area : riverside | food : Chinese ||"
    assert tokenizer.decode(example["input_ids"][split:]) == "Blue Spice serves Chinese food . </s>"
    batch = out.collate(out.train[:2])
    row = batch["input_ids"][0].gather(0, batch["target_positions"][0][:1] + 1)
    assert int(row) == int(batch["targets"][0, 0]) == int(example["input_ids"][split])
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, len(example["input_ids"]) - 1] = 5  # the end of text is predicted, and predicts nothing
    torch.testing.assert_close(task.loss(out.model, changed), task.loss(out.model, batch), rtol=1e-12, atol=0)
    changed["input_ids"][0, 0] = 5
    assert task.loss(out.model, changed)[0] != task.loss(out.model, batch)[0]
    assert task.loss(out.model, changed)[1] == task.loss(out.model, batch)[1]


def test_long_examples_are_cut_at_the_start_of_the_prompt_then_at_the_end(folders):
    encoder = causal.Encoder(models.load_tokenizer(folders("llama")), 48, 10, "m")
    rows = [{"prompt": "a " * 9 + "the", "response": "is " * 20}, {"prompt": "a " * 30 + "the", "response": "is ."}]
    first, second = encoder(rows)
    assert len(first["input_ids"]) == len(second["input_ids"]) == 10
    assert first["prompt_length"] == 5 and second["prompt_length"] == 7
    assert encoder.tokenizer.decode(second["input_ids"]) == "a a a a a a the is . </s>"
    assert (
        encoder([{"prompt": "", "response": "is"}])[0]["input_ids"].tolist()
        == encoder.tokenizer("<s> is </s>").input_ids
    )
    with pytest.raises(CannotRun, match="at most 48 tokens; lower max_length from 49"):
        causal.Encoder(encoder.tokenizer, 48, 49, "m")


def peak(model, loss, batch, method="dp-adam"):
    """Live bytes of a factored pass beside the parameters."""
    clock = Clock(torch.device("cpu"))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = FactoredEngine(model, loss, parameters, no_clock)
    engine.agreed = True  # the comparison with autograd is no part of a step
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with LiveBytes(clock) as live:
        engine.accumulate(batch, sums, 1.0, {})
    engine.close()
    return sum(live.peak.values())


@pytest.mark.parametrize("trains", ["everything", "norms"])
def test_the_logits_of_a_batch_never_exist_at_once(trains):
    """16 examples of 32 tokens over 8,000 words: 16 MiB of fp32 logits, of which 1 MiB is allowed to exist."""
    config = causal_cases.hf.GPT2Config(vocab_size=8000, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = causal.causal_model()(causal_cases.hf.GPT2LMHeadModel(config).eval())
    model.vocabulary.at_once = 1 << 18
    for name, p in model.named_parameters():
        p.requires_grad_(trains == "everything" or "ln_" in name)
    ids = torch.randint(8000, (16, 32), generator=torch.Generator().manual_seed(0))
    places = torch.arange(31).expand(16, 31)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(32).expand(16, 32)}
    batch |= {"targets": ids[:, 1:].contiguous(), "target_positions": places}
    task = registry.task("e2e")({"max_new_tokens": 12})
    logits = 16 * 31 * 8000 * 4
    assert peak(model, plain_loss, batch) > 2 * logits
    assert peak(model, task.loss, batch) < logits / 2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_a_padded_batch_equals_one_prompt_at_a_time(kind, beams, prepared):
    _, out = prepared(kind)
    prompts = ["name : Cotto ||", "name : Blue Spice | area : city centre | food : French ||", "a"]
    device = torch.device("cpu")
    together = causal.generate(out.model, out.writing.encoder, prompts, device, beams, 12)
    alone = [causal.generate(out.model, out.writing.encoder, [p], device, beams, 12)[0] for p in prompts]
    assert together == alone and len(set(together)) > 1 and out.model.training
    if beams == 1:  # by hand, without padding, cache or transformers' search
        ids = out.writing.encoder.prompts(prompts[:1])[0]
        start = len(ids)
        for _ in range(12):
            ids.append(int(out.model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        expected = out.writing.encoder.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert together[0] == " ".join(expected.split())


def test_models_that_cannot_be_used_are_refused(tmp_path, folders):
    hf = causal_cases.hf
    bert = hf.BertConfig(**causal_cases.BODY, vocab_size=30, max_position_embeddings=20)
    hf.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(CannotRun, match="see those behind it"):
        causal.load(str(tmp_path / "bert"))
    capped = hf.Gemma2Config(**causal_cases.LLAMA, head_dim=8, final_logit_softcapping=0.1)
    hf.Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    with pytest.raises(CannotRun, match="more than its output layer's weight"):
        causal.load(str(tmp_path / "capped"))
    hf.T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(CannotRun, match="is no causal language model"):
        causal.load(str(tmp_path / "t5"))
    hf.AutoModel.from_config(causal_cases.CONFIGS["llama"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(CannotRun, match="has no trained weights for lm_head.weight"):
        causal.load(str(tmp_path / "bare"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(CannotRun, match="Cannot load"):
        causal.load(models.resolve(str(tmp_path / "broken.gguf")))
    with pytest.raises(CannotRun, match="does not exist"):
        models.resolve(str(tmp_path / "no.gguf"))
    with pytest.raises(CannotRun, match="need an encoder"):
        models.load_model(str(tmp_path / "broken.gguf"), "mean", 2, torch.Generator())

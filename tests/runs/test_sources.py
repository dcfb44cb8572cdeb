"""The same command on other data or another model never prints the old row, and a row without its data is not printed."""

import json
import os
import shutil
import time

import polars
import pytest

from dpft.harness.records.store import Store
from dpft.harness.runs import registry, spec
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.settings import Settings

SMALL = ["--steps", "2", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=16"]
TRAIN = "nyu-mll/glue/sst2/train.parquet"


@pytest.fixture
def mine(mirror, tiny_bert, tmp_path):
    """A mirror and a model of the test's own, which it may change, and the command that uses them."""

    class Mine:
        data, model, results = tmp_path / "mirror", tmp_path / "bert", tmp_path / "runs"
        train = data / TRAIN
        command = ["--task", "sst2", "--model", model, "--data-dir", data, "--results", results]
        command += ["--method", "last-layer", *SMALL]

        def rows(self):
            return polars.read_parquet(self.train)

    shutil.copytree(mirror, Mine.data)
    shutil.copytree(tiny_bert, Mine.model)
    return Mine()


def refusal(result):
    """The one sentence of a refused command."""
    code, out, err = result
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("dpft: "), (code, out, err)
    return lines[0]


def only(folder):
    [record] = Store(folder).records()
    return record


def changed_text(rows):
    return rows.with_columns(
        sentence=polars.when(polars.int_range(polars.len()) == 7).then(polars.lit("the plot")).otherwise("sentence")
    )


def changed_label(rows):
    return rows.with_columns(
        label=polars.when(polars.int_range(polars.len()) == 7).then(1 - polars.col("label")).otherwise("label")
    )


CHANGES = {
    "text": changed_text,
    "label": changed_label,
    "fewer": lambda rows: rows.head(500),
    "order": lambda rows: rows.reverse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_rows_are_refused_and_overwrite_makes_the_run_of_them(dpft, mine, change):
    assert dpft("run", *mine.command, "--quiet")[0] == 0
    old = only(mine.results)
    change(mine.rows()).write_parquet(mine.train)
    now = registry.task("sst2")().load(mine.data).fingerprint
    said = refusal(dpft("run", *mine.command))
    then = old["provenance"]["data_fingerprint"]
    assert all(word in said for word in (old["run_id"], then[:12], now[:12], "--overwrite", "--results", "other data"))
    assert only(mine.results) == old, "a record is lost only when asked"
    assert dpft("run", *mine.command, "--json")[:2] == (2, "")
    assert dpft("report", mine.results)[0] == 0, "a report reads records and asks for no data"
    [row] = json.loads(dpft("plan", *mine.command, "--json")[1])
    assert row["state"] == "done, data changed"

    code, _, err = dpft("run", *mine.command, "--overwrite", "--quiet")
    assert code == 0, err
    new = only(mine.results)
    assert new["run_id"] == old["run_id"] and new["provenance"]["data_fingerprint"] == now
    assert new["privacy"]["num_examples"] == mine.rows().height
    assert dpft("run", *mine.command)[::2] == (0, "")
    [row] = json.loads(dpft("plan", *mine.command, "--json")[1])
    assert row["state"] == "done"


def test_another_mirror_is_refused_and_another_folder_keeps_both(dpft, mine, tmp_path):
    assert dpft("run", *mine.command, "--quiet")[0] == 0
    other = tmp_path / "other"
    shutil.copytree(mine.data, other)
    assert dpft("run", *mine.command, "--data-dir", other)[::2] == (0, ""), (
        "the same rows at another place are the same"
    )
    changed_label(mine.rows()).write_parquet(other / TRAIN)
    for more in ([], ["--jobs", "2"], ["--executor", "ray"]):
        assert "other data" in refusal(dpft("run", *mine.command, "--data-dir", other, *more))
    assert dpft("run", *mine.command, "--data-dir", other, "--results", tmp_path / "two", "--quiet")[0] == 0
    [first, second] = only(mine.results), only(tmp_path / "two")
    assert first["run_id"] == second["run_id"]
    said = refusal(dpft("merge", mine.results, tmp_path / "two", tmp_path / "both"))
    assert first["run_id"] in said and "other data" in said


def test_merge_refuses_records_of_different_data_whose_numbers_agree(dpft, mine, tmp_path):
    assert dpft("run", *mine.command, "--quiet")[0] == 0
    shutil.copytree(mine.results, tmp_path / "two")
    path = next((tmp_path / "two").glob("*.json"))
    record = json.loads(path.read_text())
    assert dpft("merge", mine.results, tmp_path / "two", tmp_path / "both")[0] == 0
    record["provenance"]["data_fingerprint"] = "0" * 64
    path.write_text(json.dumps(record))
    assert "other data" in refusal(dpft("merge", mine.results, tmp_path / "two", tmp_path / "both"))


@pytest.mark.parametrize("missing", ["folder", "file", "damaged"])
def test_a_missing_mirror_is_said_also_where_all_records_are_there(dpft, mine, missing):
    assert dpft("run", *mine.command, "--quiet")[0] == 0
    old = only(mine.results)
    if missing == "folder":
        shutil.rmtree(mine.data)
    elif missing == "file":
        mine.train.unlink()
    else:
        mine.train.write_bytes(b"not parquet")
    said = refusal(dpft("run", *mine.command))
    assert str(mine.data) in said and "cannot be read" in said and f"dpft report {mine.results}" in said
    assert "kept" in refusal(dpft("run", *mine.command, "--overwrite"))
    assert only(mine.results) == old, "nothing that could not be made again is replaced"
    code, out, _ = dpft("report", mine.results)
    assert code == 0 and "last-layer" in out
    [row] = json.loads(dpft("plan", *mine.command, "--json")[1])
    assert row["state"] == "done, data or model not here" and str(mine.data) in row["problem"]


def test_a_changed_file_of_ones_own(dpft, tmp_path):
    from causal_cases import save

    def write(last):
        rows = [{"text": "Blue Spice is a cheap pub ."}] * 30 + [{"text": "Cotto serves French food ."}] * 9
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": last}])))

    write("a good place near the riverside")
    command = ["--task", "causal-lm", "--set", f"file={tmp_path / 'rows.jsonl'}", "--method", "dp-lora"]
    command += ["--model", save("llama", tmp_path / "llama"), "--results", tmp_path / "runs", "--batch-size", "8"]
    command += ["--steps", "2", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=16"]
    code, _, err = dpft("run", *command, "--quiet")
    assert code == 0, err
    assert dpft("run", *command)[::2] == (0, "")
    write("a good place near the city centre")
    assert "other data" in refusal(dpft("run", *command))
    assert dpft("run", *command, "--overwrite", "--quiet")[0] == 0
    assert dpft("run", *command)[::2] == (0, "")


def test_a_changed_model_folder(dpft, mine):
    from safetensors.torch import load_file, save_file

    assert dpft("run", *mine.command, "--quiet")[0] == 0
    weights = load_file(mine.model / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][7, 3] += 1
    save_file(weights, mine.model / "model.safetensors", {"format": "pt"})
    said = refusal(dpft("run", *mine.command))
    assert "other model" in said and "--overwrite" in said and only(mine.results)["run_id"] in said
    [row] = json.loads(dpft("plan", *mine.command, "--json")[1])
    assert row["state"] == "done, model changed"
    assert dpft("run", *mine.command, "--overwrite", "--quiet")[0] == 0
    assert dpft("run", *mine.command)[::2] == (0, "")
    tokens = mine.model / "tokenizer.json"
    words = tokens.read_text()
    tokens.write_text(
        words.replace('"lowercase":true', '"lowercase":false').replace('"lowercase": true', '"lowercase": false')
    )
    assert tokens.read_text() != words
    assert "other model" in refusal(dpft("run", *mine.command)), "a tokenizer is part of the model"
    shutil.rmtree(mine.model)
    assert f"{mine.model} does not exist" in refusal(dpft("run", *mine.command))


def test_a_run_cut_short_on_other_data_starts_again(dpft, mine, tmp_path):
    def made(folder, settings, observe=lambda step, row: None, path=None):
        one = resolve({"task": "sst2", "method": "last-layer", "model": str(mine.model), "batch_size": 60, "steps": 4,
                            "epsilon": 3.0, "eval_every": 2, "max_length": 16})  # fmt: skip
        return run.execute(one, settings, observe, path)

    class Killed(BaseException):
        pass

    def kill(step, row):
        if step == 3:
            raise Killed

    settings, path = Settings(mine.data, checkpoint_seconds=0.0), tmp_path / "run.ckpt"
    with pytest.raises(Killed):
        made(mine.results, settings, kill, path)
    assert path.exists()
    steps = []
    changed_label(mine.rows()).write_parquet(mine.train)
    record, curve = made(mine.results, settings, lambda step, row: steps.append(step), path)
    assert steps == [1, 2, 3, 4], "two steps would be of the old rows"
    assert [row["loss"] for row in curve] == [row["loss"] for row in made(mine.results, settings)[1]]
    assert record["status"] == "done"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A task of a plug-in, which knows nothing of fingerprints but `load`; the file gets a letter for each call of it."""
    plugin, loads = tmp_path / "counted.py", tmp_path / "loads"
    plugin.write_text(
        "import os\nfrom dpft.tasks.glue import Sst2\n\n\nclass Counted(Sst2):\n    name = 'counted'\n\n"
        "    def load(self, data_dir):\n        with open(os.environ['LOADS'], 'a') as file:\n            file.write('x')\n"
        "        return super().load(data_dir)\n"
    )
    monkeypatch.setenv("LOADS", str(loads))
    registry.load_plugin(plugin)
    yield loads
    registry._PLUGINS.pop()
    registry.forget()


def test_one_look_serves_all_runs_of_a_command(dpft, mine, counted):
    command = [*mine.command, "--task", "counted"]
    code, _, err = dpft("run", *command, "--quiet")
    assert code == 0, err
    record, curve = only(mine.results), Store(mine.results).curve(only(mine.results)["run_id"])
    for seed in range(50):
        one = spec.RunSpec(**{**record["spec"], "seed": seed})
        Store(mine.results).write({**record, "run_id": one.run_id, "spec": one.to_dict()}, curve.to_dicts())
    command += ["--seeds", ",".join(map(str, range(50)))]
    counted.write_text("")
    code, _, err = dpft("run", *command)
    assert (code, err, counted.read_text()) == (0, "", "x")
    assert dpft("plan", *command)[0] == 0 and counted.read_text() == "xx"
    changed_label(mine.rows()).write_parquet(mine.train)
    assert "the first of 50 such" in refusal(dpft("run", *command))


def test_other_data_of_another_process_are_not_taken_for_ones_own(mine, monkeypatch, dpft):
    """Another process makes the run, of other rows, after this one has found nothing."""
    real = Store.claim

    def busy(self, run_id, wait=False):
        if not wait:
            rows = mine.rows()
            changed_label(rows).write_parquet(mine.train)
            monkeypatch.setattr(Store, "claim", real)
            assert dpft("run", *mine.command, "--quiet")[0] == 0
            rows.write_parquet(mine.train)
        return real(self, run_id, wait)

    monkeypatch.setattr(Store, "claim", busy)
    code, out, err = dpft("run", *mine.command)
    assert code == 2 and out == "" and "other data" in err


def test_overwrite_also_replaces_a_file_dated_in_the_future(dpft, mine):
    assert dpft("run", *mine.command, "--quiet")[0] == 0
    path = Store(mine.results).record_path(only(mine.results)["run_id"])
    old, later = path.read_text(), time.time() + 86400
    os.utime(path, (later, later))
    assert "[1/1]" in dpft("run", *mine.command, "--overwrite")[2]
    assert path.read_text() != old


@pytest.mark.parametrize("name", ["sentences", "reviews", "digits", "low-rank"])
def test_the_fingerprint_is_that_of_the_rows(name):
    task = registry.task(name)()
    assert task.fingerprint(None) in (task.load(None).fingerprint, None)
    assert (task.fingerprint(None) is None) == (name == "low-rank")


def test_a_gguf_file_is_known_by_its_bytes_and_names_by_nothing(tmp_path):
    from dpft.tasks.model_files import files_fingerprint

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    first = files_fingerprint(str(file))
    file.write_bytes(b"GGUF two")
    assert len(first) == 64 and files_fingerprint(str(file)) not in (first, None)
    assert {files_fingerprint(name) for name in ("minilm-l6", "canaries-64", "linear", "owner/model")} == {None}

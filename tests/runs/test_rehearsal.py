"""`dpft plan` finds what would stop a run, and says what it should cost; `dpft prepare` fetches and reads what runs need."""

import json
import shutil

import polars
import pytest
from small_runs import a_spec

from dpft.harness.records.store import Store
from dpft.harness.runs import registry
from dpft.harness.runs.rehearsal import rehearse

SIZE = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=16"]


@pytest.fixture
def plan(dpft, tiny_bert, mirror, tmp_path, own_cache):
    """plan(*more, model=, data=) -> (exit code, rows, the text)."""

    def call(*more, model=tiny_bert, data=mirror, task="sst2"):
        command = ["plan", "--task", task, "--model", model, "--results", tmp_path / "runs", *SIZE, *more]
        command += ["--data-dir", data] if data is not None else []
        code, out, _ = dpft(*command)
        return code, json.loads(dpft(*command, "--json")[1]), out

    return call


@pytest.fixture
def broken(tiny_bert, mirror, tmp_path):
    """A model folder without weights, and a mirror whose validation split lacks a column."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    shutil.copytree(mirror, tmp_path / "mirror")
    path = tmp_path / "mirror/nyu-mll/glue/sst2/validation.parquet"
    polars.read_parquet(path).drop("label").write_parquet(path)
    return tmp_path


def test_what_is_fine_is_fine(plan):
    code, rows, out = plan("--method", "dp-adam,dp-lora")
    assert code == 0 and [row["problem"] for row in rows] == [None, None] and "would fail" not in out
    assert all(row["peak_bytes"] > 0 and "prediction" in row["by"] for row in rows)


def test_no_method_is_said_to_fail_that_does_not(tiny_bert, mirror, tmp_path):
    """Some look at weights, which a rehearsal has not."""
    runs = [a_spec(method, tiny_bert) for method in registry.methods()]
    assert rehearse(runs, Store(tmp_path), mirror).problems == {}


def test_everything_that_would_stop_a_run_is_named_once_and_is_exit_code_2(plan, broken, tmp_path):
    def said(*more, **of):
        code, rows, out = plan("--method", "dp-adam", "--seeds", "0,1", *more, **of)
        assert code == 2 and out.count("2 of 2 runs would fail") == 1 and all(row["problem"] for row in rows), out
        return rows[0]["problem"]

    assert "holds a configuration and no weights" in said(model=broken / "model")
    assert "validation.parquet has no column label" in said(data=broken / "mirror")
    assert "The data mirror has no file" in said(data=tmp_path)
    assert "takes at most 32 tokens; lower max_length from 64" in said("--set", "max_length=64")
    assert "does not exist" in said(model="./nowhere/at/all")
    assert "is not here, and HF_HUB_OFFLINE is set; fetch it" in said(model="roberta-base")
    assert "is not here, and HF_HUB_OFFLINE is set; give --data-dir" in said(data=None)
    assert "larger than the 600 training examples" in said("--batch-size", "6000")
    assert "model of its own" in said(model="tiny", task="low-rank", data=None)
    (tmp_path / "runs").write_text("a file")
    assert "choose --results DIR" in said()


def test_what_a_method_cannot_do_with_a_model_is_found_without_its_weights(plan, broken):
    (broken / "model/model.safetensors").write_bytes(b"no weights at all")
    assert plan("--method", "dp-lora", model=broken / "model")[0] == 0
    code, rows, out = plan("--method", "dp-lora", "--set", "targets=nonsense", model=broken / "model")
    assert code == 2 and "nonsense" in rows[0]["problem"]


def test_what_a_method_would_skip_is_said_and_is_no_failure(dpft, tmp_path):
    of = ["--model", "layers", "--batch-size", "64", "--steps", "2", "--epsilon", "1", "--results", tmp_path / "runs"]
    code, out, _ = dpft("plan", "--task", "low-rank", "--method", "prompt,dp-sgd", *of)
    assert code == 0 and out.count("1 of 2 runs would be skipped") == 1 and "no table of them; use dp-lora." in out


def test_runs_that_are_done_are_not_rehearsed_and_say_what_others_should_cost(dpft, plan, tiny_bert, mirror, tmp_path):
    command = ["run", "--task", "sst2", "--model", tiny_bert, "--results", tmp_path / "runs", *SIZE]
    assert dpft(*command, "--data-dir", mirror, "--method", "last-layer", "--quiet")[0] == 0
    _, [done], _ = plan("--method", "last-layer")
    _, [more], _ = plan("--method", "last-layer", "--steps", "4000", "--batch-size", "120")
    assert done["by"] == done["run"] and more["by"] == f"{done['run']}, other batch_size"
    record = json.loads((tmp_path / f"runs/{done['run']}.json").read_text())
    cost = record["cost"]
    assert more["seconds"] == round(cost["step_s"] * 4000 * 2 + cost["eval_s"] * 2001 / 3)
    assert more["peak_bytes"] == sum(cost["peak_bytes"].values())


def test_prepare_says_what_it_would_fetch_and_reads_what_is_here(dpft, tiny_bert, mirror, tmp_path, own_cache):
    of = ["--method", "dp-adam,dp-lora", "--set", "max_length=16"]
    code, out, err = dpft("prepare", "--task", "sst2", "--model", tiny_bert, "--data-dir", mirror, *of)
    assert (code, out) == (0, "Nothing is to be fetched.\n") and err.count("reading sst2") == 1
    code, out, _ = dpft("prepare", "--task", "sentences", "--model", "roberta-base", *of, "--dry-run")
    assert code == 0 and "the data vaderSentiment-3.3.2.tar.gz, from the package index" in out
    assert "the model FacebookAI/roberta-base, from the hub" in out
    code, out, err = dpft("prepare", "--task", "sst2", "--model", "roberta-base", "--data-dir", mirror, *of)
    assert code == 2 and "cannot be fetched: HF_HUB_OFFLINE is set" in err and err.count("\n") == 1


def test_prepare_fetches(dpft, tiny_bert, mirror, own_cache):
    """The digits' models are made here, so this needs no network."""
    of = ["prepare", "--task", "digits", "--model", "digits-resnet", "--method", "dp-adam"]
    assert "from this machine" in dpft(*of)[1]
    assert dpft(*of)[1] == "Nothing is to be fetched.\n"

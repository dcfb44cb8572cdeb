"""`dpft run --replay`: a run made again from its record and compared with it."""

import copy
import json
import sys

import polars
import pytest

from dpft.harness import cli
from dpft.harness.records.replay import compare
from dpft.harness.records.store import Store

SMALL = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["dpft", *map(str, arguments)])
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def made(tiny_bert, mirror, tmp_path_factory):
    """(store of one run, its id, its mirror)."""
    results = tmp_path_factory.mktemp("replay")
    common = ["--task", "sst2", "--model", tiny_bert, "--data-dir", mirror, "--results", results, *SMALL]
    assert call("run", *common, "--method", "dp-lora", "--quiet") == 0
    store = Store(results)
    (record,) = store.records()
    return store, record["run_id"], mirror


@pytest.fixture
def copied(made, tmp_path):
    """(store, id, a function that changes the record, one that changes a row of the curve)."""
    store, run_id, _ = made
    other = Store(tmp_path / "copy")
    other.open_for_writing()
    other.take_from(store, store.read(run_id))

    def record(change):
        content = store.read(run_id)
        change(content)
        other.record_path(run_id).write_text(json.dumps(content))

    def row(step, **values):
        rows = store.curve(run_id).rows(named=True)
        rows[step - 1].update(values)
        polars.DataFrame(rows).write_parquet(other.curve_path(run_id))

    return other, run_id, record, row


def replay(capsys, store, run_id, mirror):
    capsys.readouterr()
    code = call("run", "--replay", run_id, "--results", store.folder, "--data-dir", mirror, "--quiet")
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.count("\n") == (code == 2)
    return code, said.out + said.err


def test_a_run_made_again_is_equal_bit_for_bit_and_nothing_is_written(made, capsys):
    store, run_id, mirror = made
    before = {path: path.read_bytes() for path in store.folder.iterdir() if path.is_file()}
    assert replay(capsys, store, run_id, mirror) == (0, f"{run_id}: equal bit for bit.\n")
    assert before == {path: path.read_bytes() for path in store.folder.iterdir() if path.is_file()}
    assert call("run", "--replay", run_id, "--results", store.folder, "--data-dir", mirror, "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "run_id": run_id, "verdict": "equal", "apart": [], "step": None, "difference": None
    }  # fmt: skip


def test_the_first_step_that_differs_is_named(copied, made, capsys):
    store, run_id, record, row = copied
    row(3, loss=9.0)
    code, said = replay(capsys, store, run_id, made[2])
    assert code == 1 and "different" in said and "Step 3: loss" in said and "the record has 9.0" in said


def test_a_record_without_a_chain_is_compared_by_curve_and_final(copied, made, capsys):
    store, run_id, record, row = copied
    rows = store.curve(run_id).drop("release")
    rows.write_parquet(store.curve_path(run_id))
    record(lambda content: content.pop("chain"))
    assert replay(capsys, store, run_id, made[2]) == (0, f"{run_id}: equal bit for bit.\n")

    def raise_final(content):
        del content["chain"]
        content["result"]["final"] = content["result"]["all_metrics"]["accuracy"] = 0.99

    record(raise_final)
    code, said = replay(capsys, store, run_id, made[2])
    assert code == 1 and "After the last step: final of the result" in said


def test_another_machine_is_a_tolerance_and_is_named(copied, made, capsys):
    store, run_id, record, row = copied
    loss = store.curve(run_id)["loss"][1]
    row(2, loss=loss * 1.001)
    record(lambda content: content["provenance"]["hardware"].update(cpu="Another 9000"))
    code, said = replay(capsys, store, run_id, made[2])
    assert code == 0 and "within the tolerance" in said and "was Another 9000" in said and "step 2: loss" in said
    row(2, loss=loss * 1.1)
    code, said = replay(capsys, store, run_id, made[2])
    assert code == 1 and "Step 2: loss" in said


def test_on_one_platform_with_the_same_code_only_equal_is_equal(made):
    store, run_id, _ = made
    record, rows = store.read(run_id), store.curve(run_id).rows(named=True)
    record["provenance"]["git"] = {"sha": "1" * 40, "dirty": False}
    assert compare(record, rows, record, rows, []).verdict == "equal"
    other = copy.deepcopy(rows)
    other[2]["release"] = "0" * 32
    found = compare(record, rows, record, other, [])
    assert (found.verdict, found.step) == ("different", 3) and found.difference.startswith("release")
    assert compare(record, rows, record, other, ["the cpu is another"]).verdict == "close"
    newer = copy.deepcopy(record)
    newer["provenance"]["git"]["sha"] = "2" * 40
    assert compare(record, rows, newer, other, []).verdict == "close"
    assert compare(record, rows, newer, other[:3], []).verdict == "different"
    ended = copy.deepcopy(record)
    ended["chain"]["value"] = "0" * 64
    assert compare(ended, rows, record, rows, []).verdict == "different"


def changed(section, key, value):
    return lambda content: content[section].update({key: value})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content.update(status="timeout", result=None, error="Late."), "only a run that is done"),
        (changed("privacy", "noise_seed", "os"), "nobody can make it again"),
        (changed("spec", "lr", 0.5), "is that of run"),
        (changed("spec", "lr", "x"), "spec.lr must be a number, not 'x'"),
        (changed("spec", "colour", "red"), "has 'colour', which this dpft does not know"),
        (changed("provenance", "data_fingerprint", "0" * 64), "The data here are not what run"),
        (lambda content: content.update(spec=None), "spec must be a table, not None"),
        (lambda content: content.update(provenance=None), "provenance must be a table, not None"),
        (lambda content: content["result"].update(final="high"), "result.final must be a number, not 'high'"),
        (lambda content: content["provenance"].update(settings={"engine": "steam"}), "engine"),
    ],
)
def test_what_cannot_be_made_again_is_one_sentence(change, words, copied, made, capsys):
    store, run_id, record, row = copied
    record(change)
    code, said = replay(capsys, store, run_id, made[2])
    assert code == 2 and words in said


@pytest.mark.parametrize("kind, name", [("task", "sst2"), ("method", "dp-lora"), ("decoder", "mean")])
def test_other_versions_are_one_sentence(kind, name, copied, made, capsys, monkeypatch):
    from dpft.harness.runs import registry

    store, run_id, record, row = copied
    monkeypatch.setattr(getattr(registry, kind)(name), "version", 99)
    code, said = replay(capsys, store, run_id, made[2])
    assert code == 2 and f"version 1 of {kind} {name}, this dpft version 99" in said


def test_questions_that_mean_nothing(made, capsys, tmp_path):
    store, run_id, mirror = made
    code, said = replay(capsys, store, "0" * 16, mirror)
    assert code == 2 and "no record of run" in said
    assert call("run", "demo", "--replay", run_id, "--results", store.folder) == 2
    assert call("run", "--method", "dp-sgd", "--replay", run_id, "--results", store.folder) == 2
    assert capsys.readouterr().err.count("leave out the suite") == 2
    store.curve_path(run_id).rename(tmp_path / "away")
    polars.read_parquet(tmp_path / "away").drop("loss", "release").write_parquet(store.curve_path(run_id))
    code, said = replay(capsys, store, run_id, mirror)
    assert code == 2 and "lacks the columns loss" in said
    store.curve_path(run_id).unlink()
    code, said = replay(capsys, store, run_id, mirror)
    (tmp_path / "away").rename(store.curve_path(run_id))
    assert code == 2 and "does not exist" in said

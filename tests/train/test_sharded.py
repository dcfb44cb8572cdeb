"""A run whose frozen weights two ranks share out is the run of one process, and each holds half of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_cases

from dpft.harness.train import ranks
from dpft.harness.train.run import execute

ROUNDING = 1e-5  # relative; float32 sums in another order, three steps on


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mirror, tiny_bert):
    folder = tmp_path_factory.mktemp("sharded")
    for inside in mirror.iterdir():
        (folder / inside.name).symlink_to(inside)
    sharded_cases.models(folder, tiny_bert)
    return folder


@pytest.fixture(scope="module")
def of_two(folder):
    """[what rank 0 made of the cases of sharded_cases.py, what rank 1 made]: case -> (record, curve, what was seen)."""
    script = Path(sharded_cases.__file__)
    here = {**os.environ, "PYTHONPATH": str(script.parents[2]), ranks.MEETING: str(folder / "meeting")}
    here |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen([sys.executable, script, folder], env={**here, "RANK": number, "LOCAL_RANK": number})
        for number in "01"
    ]
    try:
        assert [process.wait(300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def numbers(row):
    return {name: value for name, value in row.items() if value is not None and name != "release"}


@pytest.mark.parametrize("case", sharded_cases.EQUAL)
def test_two_ranks_with_half_a_model_each_make_the_record_of_one_process(case, of_two, folder, one_thread):
    spec = sharded_cases.spec_of(folder, **sharded_cases.EQUAL[case])
    record, curve = execute(spec, sharded_cases.settings_of(folder, False), sharded_cases.quiet)
    shared, rows, _ = of_two[0][case]
    assert shared["status"] == "done", shared["error"]
    record = json.loads(json.dumps(record))
    assert {key: shared[key] for key in ("run_id", "spec", "privacy")} == {
        key: record[key] for key in ("run_id", "spec", "privacy")
    }
    assert shared["provenance"]["settings"]["shard_model"] and not record["provenance"]["settings"]["shard_model"]
    assert shared["result"]["final"] == pytest.approx(record["result"]["final"], rel=ROUNDING)
    assert shared["result"].get("samples") == record["result"].get("samples")
    for ours, theirs in zip(curve, rows, strict=True):
        assert numbers(theirs) == pytest.approx(numbers(ours), rel=ROUNDING, abs=1e-6)


def test_it_is_bit_for_bit_the_run_of_two_ranks_with_the_whole_model_each(of_two):
    (whole, curve, _), (shared, rows, _) = of_two[0]["whole"], of_two[0]["adapters"]
    assert rows == curve and shared["result"] == whole["result"] and shared["chain"] == whole["chain"]


@pytest.mark.parametrize("case", sharded_cases.EQUAL)
def test_each_rank_holds_half_of_the_blocks_and_one_of_them_whole(case, of_two):
    for one in of_two:
        seen = one[case][2]
        assert seen["own"] == pytest.approx(seen["all"] / 2, rel=0.02), "a rank has more than its part"
        assert seen["blocks"] > 2 and seen["at once"] == 1, "a block was not let go"


def test_the_saving_is_in_the_record(of_two):
    (whole, _, _), (shared, _, seen) = of_two[0]["whole"], of_two[0]["adapters"]
    held, fewer = (record["cost"]["peak_bytes"] for record in (whole, shared))
    assert held["parameters"] - fewer["parameters"] == pytest.approx(seen["all"] / 2, rel=0.02)
    assert fewer["gathered"] <= 1.1 * seen["largest"]


def test_ranks_have_different_numbers_of_passes(of_two):
    """No pass is made for nothing: that is what exchanges in a fixed order would ask for."""
    passes = [{case: one[case][2].get("passes") for case in sharded_cases.EQUAL} for one in of_two]
    assert passes[0] != passes[1]


def test_a_run_that_a_signal_to_one_rank_ended_goes_on_bit_for_bit(of_two):
    (record, curve, _), (resumed, rows, _) = of_two[0]["adapters"], of_two[0]["resumed"]
    assert rows == curve and resumed["result"] == record["result"] and resumed["chain"] == record["chain"]
    assert resumed["privacy"] == record["privacy"]


def test_secret_noise_is_the_same_on_all_ranks_and_blocks_may_run_again(of_two):
    (record, curve, _), (_, rows, _) = (one["secret"] for one in of_two)
    assert record["status"] == "done", record["error"]
    assert [row["release"] for row in curve] == [row["release"] for row in rows]


@pytest.mark.parametrize(
    ("case", "status", "sentence"),
    [
        ("failed", "oom", "Rank 1: Out of memory; lower --max-tokens or the trainable parameters."),
        ("nothing frozen", "error", "dp-adam trains all of "),
    ],
)
def test_where_one_rank_fails_all_end_alike(case, status, sentence, of_two):
    ends = [(one[case][0]["status"], one[case][0]["error"]) for one in of_two]
    assert ends[0] == ends[1] and ends[0][0] == status and ends[0][1].startswith(sentence), ends

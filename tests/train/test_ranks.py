"""A run that two processes share is the run of one: same spec and budget, numbers to rounding, noise once, one ending."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import rank_cases
import torch

from dpft.harness.train import ranks
from dpft.harness.train.run import execute

ROUNDING = 1e-5  # relative; float32 sums of a few hundred examples in another order, four steps on


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """[what rank 0 made of the cases of rank_cases.py, what rank 1 made]: case -> (record, curve)."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(rank_cases.__file__)
    root = str(script.parents[2])
    here = {
        **os.environ,
        "PYTHONPATH": root,
        ranks.MEETING: str(folder / "meeting"),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
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


@pytest.mark.parametrize("case", rank_cases.EQUAL)
def test_two_ranks_make_the_record_of_one_process(case, of_two, one_thread):
    record, curve = execute(rank_cases.spec_of(**rank_cases.EQUAL[case]), rank_cases.SMALL, rank_cases.quiet)
    shared, rows = of_two[0][case]
    assert shared["status"] == "done", shared["error"]
    record = json.loads(json.dumps(record))
    assert {key: shared[key] for key in ("run_id", "spec", "privacy")} == {
        key: record[key] for key in ("run_id", "spec", "privacy")
    }
    assert (record["provenance"]["settings"]["ranks"], shared["provenance"]["settings"]["ranks"]) == (1, 2)
    assert shared["result"]["final"] == pytest.approx(record["result"]["final"], rel=ROUNDING)
    for ours, theirs in zip(curve, rows, strict=True):
        assert numbers(theirs) == pytest.approx(numbers(ours), rel=ROUNDING, abs=1e-6)
    if case == "noise alone":  # the sums are zeros: what is released is the noise, of which there is as much as ever
        assert [row["release"] for row in rows] == [row["release"] for row in curve]
    else:
        assert rows[0]["release"] != curve[0]["release"], "two partial sums are rounded as one is: was anything shared?"


def test_a_shared_run_that_a_signal_to_one_rank_ended_goes_on_bit_for_bit(of_two):
    (record, curve), (resumed, rows) = of_two[0]["two releases"], of_two[0]["resumed"]
    assert rows == curve and resumed["result"] == record["result"] and resumed["chain"] == record["chain"]
    assert resumed["privacy"] == record["privacy"]


def test_secret_noise_is_the_same_on_all_ranks(of_two):
    (record, curve), (other, rows) = (one["secret"] for one in of_two)
    assert record["status"] == "done", record["error"]
    assert [row["release"] for row in curve] == [row["release"] for row in rows]
    assert curve[0]["release"] != of_two[0]["two releases"][1][0]["release"], "it is that of the seed"


@pytest.mark.parametrize(
    ("case", "status", "sentence"),
    [
        ("failed", "oom", "Rank 1: Out of memory; lower --max-tokens or the trainable parameters."),
        ("late", "timeout", "The run passed its time limit at step 0 of 4."),
        ("parted", "error", "The ranks do not have the same releases and weights after step 4"),
    ],
)
def test_where_one_rank_fails_all_end_alike(case, status, sentence, of_two):
    ends = [(one[case][0]["status"], one[case][0]["error"]) for one in of_two]
    assert ends[0] == ends[1] and ends[0][0] == status and ends[0][1].startswith(sentence), ends


def test_examples_are_dealt_once_and_by_tokens():
    lengths = [1 + (i * i) % 37 for i in range(200)]
    batch = list(range(0, 200, 3))
    dealt = []
    for number in range(3):
        one = ranks.Ranks()
        one.number, one.count = number, 3
        dealt.append(one.share(batch, lengths))
    assert Counter(index for own in dealt for index in own) == Counter(batch)
    tokens = [sum(lengths[index] for index in own) for own in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert ranks.ALONE.share(batch, lengths) == batch


def test_sums_of_many_sizes_are_packed_in_order(monkeypatch):
    monkeypatch.setattr(ranks, "PACK", 10)
    tensors = [torch.zeros(size, dtype=kind) for size, kind in ((4, torch.float32), (6, torch.float32), (1, torch.float32),
               (20, torch.float32), (2, torch.float64), (2, torch.float32))]  # fmt: skip
    packs = list(ranks._packs(tensors))
    assert [[len(t) for t in pack] for pack in packs] == [[4, 6], [1], [20], [2], [2]]

"""A whole leaderboard through the command: real runs, stopped and continued, verified, reported."""

import re

import pytest
from click.testing import CliRunner
from small_runs import unwatched

from dpft.harness.cli import cli
from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store
from dpft.harness.records.verifying import verify_folder
from dpft.harness.runs import preparation


def dpft(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_a_board_is_run_continued_verified_and_reported(tmp_path):
    small = ("tiny", "--steps", 3, "--epsilon", 2, "--set", "eval_every=3", "--results", tmp_path)
    stopped = dpft("run", *small, "--budget", "0.001s", "--quiet")
    assert "time is up" in stopped.output and len(Store(tmp_path).ids()) == 0
    plan = dpft("plan", *small)
    assert re.search(r"low-rank +\| +3 \| +0 \|", plan.output)
    with unwatched():
        done = dpft("run", *small)
    assert done.exit_code == 0, done.output
    assert "leads" in done.output and "against the baseline" in done.output
    records = Store(tmp_path).records()
    assert {record["spec"]["split"] for record in records} == {"tune", "test"}
    sizes = {r["spec"]["split"]: r["provenance"]["validation_examples"] for r in records}
    assert sizes["tune"] != sizes["test"] and min(sizes.values()) > 100
    assert not any(verdict.findings for verdict in verify_folder(tmp_path).values())
    again = dpft("run", *small, "--quiet")
    assert again.exit_code == 0 and len(Store(tmp_path).ids()) == len(records)
    assert "tune half" in dpft("report", tmp_path).output, "a plain report keeps the halves apart"


@pytest.mark.parametrize("where", [None, "nowhere"])
def test_a_board_without_its_data_is_refused_before_a_run_fails(tmp_path, monkeypatch, where):
    monkeypatch.delenv("DPFT_DATA", raising=False)
    monkeypatch.setattr(preparation, "silent", lambda: "https://huggingface.co does not answer")
    more = ("--data-dir", tmp_path / where) if where else ()
    found = dpft("run", "half-epoch", "--results", tmp_path / "x", *more)
    assert isinstance(found.exception, BadInput) and "--data-dir" in str(found.exception), found.output  # exit code 2
    assert not Store(tmp_path / "x").ids(), "a failed run would stand"


def test_options_that_a_board_cannot_have(tmp_path):
    for more in (("--overwrite",), ("--shard", "1/2"), ("--retry-failed",), ("--budget", "soon")):
        found = dpft("run", "tiny", "--results", tmp_path / "x", *more)
        assert found.exit_code != 0 and not (tmp_path / "x").exists(), more
    assert dpft("run", "offline-mini", "--budget", "1h").exit_code != 0

"""Damaged and newer records: named, counted, and passed over where that is asked for."""

import json
import shutil

import pytest
from small_runs import TWO_STEPS
from studies import loose

RESULTS = loose("full")


@pytest.fixture
def folder(tmp_path):
    """Seven runs: a record that was cut short, one of a newer dpft, one whose curve was cut short, and four sound ones."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for path in sorted(RESULTS.glob("*.json"))[:7]:
        for one in (path, path.with_suffix(".parquet")):
            shutil.copy(one, folder)
    cut, newer, curve = sorted(folder.glob("*.json"))[:3]
    cut.write_text(cut.read_text()[:100])
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "schema": 99}))
    curve = curve.with_suffix(".parquet")
    curve.write_bytes(curve.read_bytes()[:-50])
    return folder


COMMANDS = {
    "report": lambda folder: ["report", folder],
    "verify": lambda folder: ["verify", folder],
    "merge": lambda folder: ["merge", folder, folder.parent / "all"],
    "plan": lambda folder: ["plan", "--task", "low-rank", "--method", "dp-adam", "--steps", "2", "--results", folder],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_records_are_counted_or_passed_over(dpft, folder, name):
    command = COMMANDS[name](folder)
    cut, newer, curve = sorted(path.name for path in folder.glob("*.json"))[:3]
    code, out, err = dpft(*command)
    assert (code, out) == (2, "") and err.count("\n") == 1 and cut in err and "--skip-damaged (2 such records" in err
    code, out, err = dpft(*command, "--skip-damaged")
    assert code == (1 if name == "verify" else 0), err  # to verify, a bad curve is a finding and no reason to pass over
    told = [line for line in err.splitlines() if "passed over" in line]
    assert len(told) == (2 if name == "verify" else 3) and cut in told[0] and newer in told[1]
    assert name != "merge" or len(list((folder.parent / "all").glob("*.json"))) == 4


def test_a_run_whose_record_is_newer_is_neither_made_nor_overwritten(dpft, tmp_path):
    command = [*TWO_STEPS, "--set", "eval_examples=16", "--seeds", "0,1", "--results", tmp_path, "--quiet"]
    assert dpft(*command)[0] == 0
    one, other = sorted(tmp_path.glob("*.json"))
    one.write_text(json.dumps({**json.loads(one.read_text()), "schema": 99}))
    before = one.read_text()
    code, out, err = dpft(*command, "--overwrite")
    assert code == 2 and one.name in err and "--skip-damaged" in err and err.count("\n") == 1
    stamp = other.stat().st_mtime_ns
    code, out, err = dpft(*command, "--overwrite", "--skip-damaged", "--json")
    assert code == 0 and err.count("passed over") == 1 and one.name in err, err
    assert [record["run_id"] for record in json.loads(out)] == [other.stem]
    assert one.read_text() == before and other.stat().st_mtime_ns > stamp


def test_merge_leaves_a_newer_record_of_the_target_alone(dpft, folder, tmp_path):
    newer = sorted(folder.glob("*.json"))[1]
    source = tmp_path / "source"
    source.mkdir()
    for end in (".json", ".parquet"):
        shutil.copy(RESULTS / f"{newer.stem}{end}", source)
    before = newer.read_text()
    code, _, err = dpft("merge", source, folder, "--skip-damaged")
    assert code == 0 and "0 runs copied" in err and newer.read_text() == before

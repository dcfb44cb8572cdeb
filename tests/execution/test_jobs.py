"""Several processes on one suite: every run is made once, by one of them, and survives the death of another."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_runs import a_spec

from dpft.harness import cli
from dpft.harness.execution import local
from dpft.harness.execution.progress import Quiet
from dpft.harness.records import provenance
from dpft.harness.records.store import Store
from dpft.harness.train.settings import Settings

pytestmark = pytest.mark.slow
STEPS = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]


@pytest.fixture
def command(tiny_bert, mirror, tmp_path):
    def build(folder, *more):
        base = [sys.executable, "-m", "dpft.harness", "run", "--task", "sst2", "--model", str(tiny_bert)]
        base += ["--data-dir", str(mirror), "--results", str(tmp_path / folder), *STEPS]
        return [*base, "--method", "dp-adam,noise-only", "--seeds", "0,1", *more]

    return build


def results(output):
    return {r["run_id"]: (r["status"], r["result"]["final"], r["privacy"]["ledger"]) for r in json.loads(output)}


def writers(folder):
    """Run id -> when its record was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_two_jobs_make_what_one_makes_and_overwrite_makes_each_once(command, tmp_path, monkeypatch, capsys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(sys, "argv", ["dpft", *command("one", "--json", "--quiet")[3:]])
    with pytest.raises(SystemExit):
        cli.main()
    one = capsys.readouterr().out
    two = subprocess.run(
        command("two", "--json", "--jobs", "2"), capture_output=True, text=True, env=environment, check=True
    )
    assert len(results(two.stdout)) == 4 and results(two.stdout) == results(one)
    made_here = two.stderr.count("step 4/4")
    assert 0 < made_here < 4, "the sibling made none, or all"
    before = writers(tmp_path / "two")
    again = subprocess.run(
        command("two", "--json", "--jobs", "2", "--overwrite"),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    after = writers(tmp_path / "two")
    assert all(after[key] > before[key] for key in before) and results(again.stdout) == results(one)
    assert again.stderr.count("step 4/4") < 4, "the parent made again what the sibling had made"


def test_a_killed_sibling_leaves_its_run_to_the_others(command):
    process = subprocess.Popen(
        command("killed", "--json", "--jobs", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    found = []
    while not found and time.monotonic() < deadline:
        found = children(process.pid)
    time.sleep(3)
    os.kill(found[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [status for status, *_ in results(output).values()] == ["done"] * 4


def test_siblings_leave_with_a_parent_that_was_killed(command):
    process = subprocess.Popen(
        [*command("orphans", "--jobs", "2"), "--steps", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while b"100000 steps" not in process.stderr.readline():
        pass
    [sibling] = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while alive(sibling) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(sibling), "it works on for nobody"


def test_a_terminated_command_takes_its_siblings_with_it(command):
    process = subprocess.Popen(
        [*command("terminated", "--jobs", "2"), "--steps", "100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "100000 steps" not in process.stderr.readline():
        pass
    [sibling] = children(process.pid)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.count("interrupted; finished runs are kept") == 1, err
    assert not alive(sibling)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(one) for one in found.stdout.split()]


def test_overwrite_looks_at_no_clock(dpft, tmp_path):
    """A record from a machine whose clock is ahead was kept for ever."""
    run = ["run", "--task", "low-rank", "--method", "dp-adam", "--steps", "2", "--batch-size", "256", "--epsilon", "2"]
    run += ["--set", "eval_examples=16", "--results", tmp_path, "--quiet"]
    assert dpft(*run)[0] == 0
    [path] = tmp_path.glob("*.json")
    os.utime(path, (time.time() + 1e6,) * 2)
    before = path.stat()
    assert dpft(*run, "--overwrite")[0] == 0
    assert path.stat().st_ino != before.st_ino or path.stat().st_mtime_ns != before.st_mtime_ns


def test_what_another_process_made_since_the_command_began_is_not_made_again(settings, tiny_bert, tmp_path):
    spec, store = a_spec("last-layer", tiny_bert), Store(tmp_path)
    local.run_all([spec], store, settings, local.Policy(), Quiet())
    seen = store.stamps([spec.run_id, "another"])
    assert seen.keys() == {spec.run_id}
    assert local.is_pending(store, spec, local.Policy(overwrite=True, seen=seen))
    store.write(store.read(spec.run_id), [])  # the other process, which shares this command's work
    assert not local.is_pending(store, spec, local.Policy(overwrite=True, seen=seen))


def test_a_record_says_how_many_threads_it_had_and_not_an_earlier_one():
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(provenance.collect(Settings())["hardware"]["threads"])
        assert found == [1, 2, 1]
    finally:
        torch.set_num_threads(before)

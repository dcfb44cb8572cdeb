"""Several processes on one suite: every run is made once, by one of them, and survives the death of another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Process, alive, children
from small_runs import a_spec

from dpft.harness.errors import BadInput
from dpft.harness.execution import jobs, local
from dpft.harness.execution.progress import Quiet
from dpft.harness.records import provenance
from dpft.harness.records.store import Store
from dpft.harness.train.settings import Settings, pick_device

pytestmark = pytest.mark.slow
STEPS = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]


@pytest.fixture
def arguments(tiny_bert, mirror, tmp_path):
    def build(folder, *more):
        base = ["run", "--task", "sst2", "--model", tiny_bert, "--data-dir", mirror, "--results", tmp_path / folder]
        return [*base, *STEPS, "--method", "dp-adam,noise-only", "--seeds", "0,1", *more]

    return build


def results(output):
    return {r["run_id"]: (r["status"], r["result"]["final"], r["privacy"]["ledger"]) for r in json.loads(output)}


def writers(folder):
    """Run id -> when its record was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_two_jobs_make_again_what_one_made_and_each_run_once(arguments, tmp_path, dpft):
    _, one, _ = dpft(*arguments("runs", "--json", "--quiet"))
    before = writers(tmp_path / "runs")
    command = [
        sys.executable,
        "-m",
        "dpft.harness",
        *map(str, arguments("runs", "--json", "--jobs", "2", "--overwrite")),
    ]
    two = subprocess.run(command, capture_output=True, text=True, check=True)  # both import, so that both get some
    after = writers(tmp_path / "runs")
    assert len(results(one)) == 4 and results(two.stdout) == results(one)
    assert all(after[key] > before[key] for key in before)
    assert 0 < two.stderr.count("step 4/4") < 4, "the sibling made none, or the parent made again what it had made"


def test_a_killed_sibling_leaves_its_run_to_the_others(arguments):
    more = ["--json", "--jobs", "2", "--method", "dp-adam", "--seeds", "0,1,2,3,4", "--steps", "60"]
    process = Process(*arguments("killed", *more))
    found = []
    while not found and process.poll() is None:
        time.sleep(0.05)
        found = [one for one in children(process.pid) if claims(one)]
    assert found, "no sibling had a run"
    os.kill(found[0], signal.SIGSTOP)  # so that it has one still when nothing else is left
    assert any("waiting for it" in line for line in iter(process.stderr.readline, ""))
    os.kill(found[0], signal.SIGKILL)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [status for status, *_ in results(output).values()] == ["done"] * 5


def test_siblings_leave_with_a_parent_that_was_killed(arguments):
    process = Process(*arguments("orphans", "--jobs", "2", "--steps", "100000"))
    while "100000 steps" not in process.stderr.readline():
        pass
    [sibling] = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while alive(sibling) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(sibling), "it works on for nobody"


def test_a_terminated_command_takes_its_siblings_with_it(arguments):
    process = Process(*arguments("terminated", "--jobs", "2", "--steps", "100000"))
    while "100000 steps" not in process.stderr.readline():
        pass
    [sibling] = children(process.pid)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.count("interrupted; finished runs are kept") == 1, err
    assert not alive(sibling)


def claims(pid):
    """Whether a process holds a lock."""
    return any(line.split()[4] == str(pid) for line in Path("/proc/locks").read_text().splitlines() if "->" not in line)


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


@pytest.fixture
def pretended_cards(monkeypatch):
    """A machine that says that it has two cards. It has none: what is asked of them is noted, and nothing is computed there."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_pretended_cards_are_dealt_to_siblings_in_turn(monkeypatch, pretended_cards):
    class Sibling:
        def __init__(self, command, env, **how):
            self.env = env
            started.append(self)

        def wait(self, patience=None):
            return 0

        def terminate(self):
            pass

    started = []
    monkeypatch.setattr(jobs.subprocess, "Popen", Sibling)
    with jobs.siblings(4, ["run"], {}):
        jobs.take_card(pick_device("auto"))
        assert pretended_cards == [], "the first stays on the first card"
    for sibling in started:
        monkeypatch.setenv(jobs.NUMBER, sibling.env[jobs.NUMBER])
        jobs.take_card(pick_device("auto"))
    assert pretended_cards == [1, 0, 1]
    for device in ("cuda:1", "cpu"):  # all on the one that was named
        jobs.take_card(pick_device(device))
    assert pretended_cards == [1, 0, 1]


def test_a_card_that_the_machine_does_not_even_pretend_to_have_is_refused(pretended_cards):
    assert pick_device("cuda:1") == "cuda:1"
    with pytest.raises(BadInput, match="There is no device cuda:2: cards are counted from cuda:0, and there are 2"):
        pick_device("cuda:2")

"""Runs on a real Ray cluster of one node; what a run is given of a larger one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpft.harness.execution.cluster import _keep, _places, _share

STEPS = ["--steps", "2", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'dpft[ray]'"
)


@pytest.mark.parametrize(
    "resources, device, jobs, expected",
    [
        ({"CPU": 2.0}, "auto", None, ({"num_cpus": 1}, 2)),
        ({"CPU": 16.0}, "auto", 4, ({"num_cpus": 4}, 4)),
        ({"CPU": 2.0}, "cpu", 4, ({"num_cpus": 1}, 4)),
        ({"CPU": 64.0, "GPU": 8.0}, "auto", None, ({"num_cpus": 8, "num_gpus": 1}, 8)),
        ({"CPU": 16.0, "GPU": 1.0}, "cuda", 4, ({"num_cpus": 4, "num_gpus": 0.25}, 4)),
        ({"CPU": 16.0, "GPU": 1.0}, "cpu", None, ({"num_cpus": 1}, 16)),
    ],
)
def test_a_run_gets_its_share(resources, device, jobs, expected):
    assert _share(resources, device, jobs) == expected


def command(tiny_bert, mirror, folder, *more):
    base = [sys.executable, "-m", "dpft.harness", "run", "--task", "sst2", "--model", str(tiny_bert), "--json"]
    base += ["--data-dir", str(mirror), "--results", str(folder), *STEPS, "--method", "dp-adam,noise-only", *more]
    return subprocess.run(base, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_one_sentence_says_what_to_install(tiny_bert, mirror, tmp_path):
    found = command(tiny_bert, mirror, tmp_path, "--executor", "ray")
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("dpft: --executor ray needs the package ray") and found.stderr.count("\n") == 1


@needs_ray
def test_a_cluster_makes_what_this_process_makes(tiny_bert, mirror, tmp_path):
    here = command(tiny_bert, mirror, tmp_path / "here")
    there = command(tiny_bert, mirror, tmp_path / "there", "--executor", "ray")
    assert there.returncode == 0, there.stderr
    assert there.stderr.count("step 2/2") == 2

    def results(text):
        return {r["run_id"]: (r["status"], r["result"]["final"], r["privacy"]["ledger"]) for r in json.loads(text)}

    assert results(there.stdout) == results(here.stdout)
    again = command(tiny_bert, mirror, tmp_path / "there", "--executor", "ray")
    assert results(again.stdout) == results(here.stdout) and "step" not in again.stderr


def test_a_count_of_releases_is_never_replaced_by_a_lower_one(tmp_path):
    places = _places(tmp_path / "run.ckpt")
    for sent, kept in (
        ((b"one", b".."), (b"one", b"..")),
        ((b"two", b"."), (b"two", b"..")),
        ((b"", b"..."), (b"two", b"...")),
    ):
        _keep(places, sent)
        assert tuple(path.read_bytes() for path in places) == kept


SLOW = """
import os
import time
from pathlib import Path

from dpft.methods.full import DPAdam


class Slow(DPAdam):
    name = "slow"
    version = 1
    description = "waits in every step, and says in which one it is"

    def step(self, ask, now):
        (Path(__file__).parent / "now").write_text(f"{now} {os.getpid()}")
        time.sleep(0.2)
        return super().step(ask, now)
"""


def slow_run(tmp_path):
    """The command, up to the folder of its results."""
    (tmp_path / "slow.py").write_text(SLOW)
    call = [sys.executable, "-m", "dpft.harness", "--plugin", str(tmp_path / "slow.py"), "run", "--task", "low-rank"]
    call += ["--model", "linear", "--method", "slow", "--epsilon", "8", "--batch-size", "64", "--steps", "40"]
    return [*call, "--set", "eval_every=40", "--json", "--results"]


def begun(tmp_path, step):
    """The process that takes that step or a later one, once it does."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = (tmp_path / "now").read_text().split() if (tmp_path / "now").exists() else ()
        if len(found) == 2 and int(found[0]) >= step:
            return int(found[1])
        time.sleep(0.1)
    raise TimeoutError


@needs_ray
def test_with_secure_noise_what_a_killed_worker_released_is_charged(tmp_path):
    call = [*slow_run(tmp_path), str(tmp_path / "there"), "--executor", "ray", "--jobs", "1", "--secure-noise"]
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        os.kill(begun(tmp_path, 5), signal.SIGKILL)
        assert "was lost (WorkerCrashedError)" in first.stderr.read() and first.wait() == 2
    second = subprocess.run(call, capture_output=True, text=True)
    [found] = json.loads(second.stdout)
    privacy = found["privacy"]
    assert found["status"] == "done" and 5 <= privacy["steps_lost"] <= 40 and privacy["steps_run"] == 40
    assert privacy["within_budget"] and not list((tmp_path / "there").glob("*.releases"))


@needs_ray
def test_an_interrupted_driver_has_its_workers_send_checkpoints(tmp_path):
    call = slow_run(tmp_path)
    whole = subprocess.run([*call, str(tmp_path / "here")], capture_output=True, text=True)
    (tmp_path / "now").unlink()
    there = [*call, str(tmp_path / "there"), "--executor", "ray", "--jobs", "1"]
    first = subprocess.Popen(there, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    begun(tmp_path, 5)
    first.terminate()
    assert first.wait(30) == 143, first.stderr.read()
    assert len(list((tmp_path / "there").glob("*.ckpt"))) == 1 and not list((tmp_path / "there").glob("*.json"))
    second = subprocess.run(there, capture_output=True, text=True)
    assert second.returncode == 0 and "continued from step" in second.stderr
    [found], [expected] = json.loads(second.stdout), json.loads(whole.stdout)
    assert found["result"] == expected["result"] and found["chain"] == expected["chain"]
    assert not list((tmp_path / "there").glob("*.ckpt"))

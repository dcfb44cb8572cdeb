"""Runs on a real Ray cluster of one node; what a run is given of a larger one."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from dpft.harness.execution.cluster import _share

STEPS = ["--steps", "2", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]


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


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'dpft[ray]'")
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

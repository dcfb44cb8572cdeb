"""Runs on a real Ray cluster of one node; what a run is given of a larger one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpft.harness.errors import CannotRun
from dpft.harness.execution.on_node import keep, places
from dpft.harness.execution.slots import Share, share

STEPS = ["--steps", "2", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'dpft[ray]'"
)


def nodes(*pairs):
    return [{"CPU": cpus, **({"GPU": cards} if cards else {})} for cpus, cards in pairs]


@pytest.mark.parametrize(
    "of, device, jobs, expected, at_once",
    [
        (nodes((2.0, 0)), "auto", None, Share(1), 2),
        (nodes((16.0, 0)), "auto", 4, Share(4), 4),
        (nodes((2.0, 0)), "cpu", 4, Share(1), 2),
        (nodes((64.0, 8.0)), "auto", None, Share(8, 1), 8),
        (nodes((16.0, 1.0)), "cuda", 4, Share(4, 0.25), 4),
        (nodes((16.0, 1.0)), "cpu", None, Share(1), 16),
        # a run is on one node: six of the 8 CPUs are on none of these
        (nodes((4.0, 0), (4.0, 0)), "auto", 1, Share(4), 2),
        (nodes((3.0, 0), (5.0, 0)), "auto", 2, Share(3), 2),
        # a head with CPUs and a node with a card: the head's CPUs are of no use to what needs the card
        (nodes((32.0, 0), (8.0, 1.0)), "auto", None, Share(8, 1), 1),
        # three runs on two cards: two on each, or one would wait
        (nodes((8.0, 2.0)), "auto", 3, Share(2, 0.5), 4),
        (nodes((8.0, 1.0), (8.0, 1.0)), "cuda", 3, Share(4, 0.5), 4),
        # more cards than CPUs
        (nodes((2.0, 4.0)), "auto", None, Share(0.5, 1), 4),
    ],
)
def test_a_run_gets_its_share(of, device, jobs, expected, at_once):
    found = share(of, device, jobs)
    assert found == expected and found.slots(of) == at_once


@pytest.mark.parametrize(
    "of, device, told",
    [(nodes((4.0, 0)), "cuda", "no node"), (nodes((0.0, 0)), "auto", "has a CPU"), ([], "cpu", "CPU")],
)
def test_what_no_node_can_give_is_refused_at_once(of, device, told):
    with pytest.raises(CannotRun, match=told):
        share(of, device, None)


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
    two = places(tmp_path / "run.ckpt")
    for sent, kept in (
        ((b"one", b".."), (b"one", b"..")),
        ((b"two", b"."), (b"two", b"..")),
        ((b"", b"..."), (b"two", b"...")),
    ):
        keep(two, sent)
        assert tuple(path.read_bytes() for path in two) == kept


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
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path, address):
    call = [*slow_run(tmp_path), str(tmp_path / "there"), "--executor", "ray"]
    found = subprocess.run(call, capture_output=True, text=True, timeout=60, env={**os.environ, "RAY_ADDRESS": address})
    assert found.returncode == 2 and f"RAY_ADDRESS ({address}) cannot be reached" in found.stderr
    assert found.stderr.count("\n") == 1 and found.stdout == ""


@needs_ray
def test_with_secure_noise_what_a_killed_worker_released_is_charged(tmp_path):
    call = [*slow_run(tmp_path), str(tmp_path / "there"), "--executor", "ray", "--jobs", "1", "--secure-noise"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        os.kill(begun(tmp_path, 5), signal.SIGKILL)
        told, found = command.communicate()[::-1]
    assert "was lost (WorkerCrashedError); it is made elsewhere" in told and command.returncode == 0, told
    [found] = json.loads(found)
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


@pytest.fixture
def three_nodes(monkeypatch):
    """A cluster on this machine: a head for the drivers, and two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, workers
    cluster.shutdown()


def in_order(text):
    return {r["spec"]["seed"]: (r["status"], r["chain"], r["result"]) for r in json.loads(text)}


@needs_ray
def test_runs_of_a_node_that_is_gone_go_on_elsewhere_from_their_checkpoints(tmp_path, three_nodes):
    cluster, (node, _) = three_nodes
    call = [*slow_run(tmp_path)[:-1], "--seeds", "0,1", "--checkpoint-every", "0", "--results"]
    alone = subprocess.run([*call, str(tmp_path / "here")], capture_output=True, text=True)
    (tmp_path / "now").unlink()
    there = [*call, str(tmp_path / "there"), "--executor", "ray"]
    with subprocess.Popen(there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        begun(tmp_path, 10)
        cluster.remove_node(node, allow_graceful=False)
        told, found = command.communicate()[::-1]
    assert command.returncode == 0, told
    assert told.count("it is made elsewhere") == 1 and "continued from step" in told, told
    assert in_order(found) == in_order(alone.stdout) and len(in_order(found)) == 2
    assert not list((tmp_path / "there").glob("*.ckpt"))


@needs_ray
def test_a_command_that_was_killed_goes_on_from_what_came(tmp_path, three_nodes):
    call = [
        *slow_run(tmp_path)[:-1],
        "--checkpoint-every",
        "0",
        "--results",
        str(tmp_path / "there"),
        "--executor",
        "ray",
    ]
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        begun(tmp_path, 10)
        first.kill()
    second = subprocess.run(call, capture_output=True, text=True)
    assert second.returncode == 0 and "continued from step" in second.stderr, second.stderr
    assert not list((tmp_path / "there").glob("*.ckpt"))


@needs_ray
def test_two_commands_share_a_cluster_and_a_folder(tmp_path, three_nodes):
    (tmp_path / "slow.py").write_text(SLOW)
    call = [
        sys.executable,
        "-m",
        "dpft.harness",
        "--plugin",
        "slow.py",
        "run",
        "--task",
        "low-rank",
        "--model",
        "linear",
    ]
    call += [
        "--method",
        "slow",
        "--epsilon",
        "8",
        "--batch-size",
        "64",
        "--steps",
        "8",
        "--set",
        "eval_every=4",
        "--json",
    ]
    call += ["--seeds", "0,1,2,3,4,5", "--results", "there", "--executor", "ray", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [
        subprocess.Popen(call, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [command.communicate() for command in commands]
    assert [command.returncode for command in commands] == [0, 0], told
    made = [err.count("done: ") for _, err in told]
    assert sum(made) == 6 and min(made) > 0, told
    assert in_order(told[0][0]) == in_order(told[1][0]) and len(in_order(told[0][0])) == 6
    assert all(" step 4/8 " in err for _, err in told), "as they are made"


@needs_ray
def test_why_a_worker_could_not_make_a_run_is_said(tmp_path, three_nodes):
    call = slow_run(tmp_path)
    with open(tmp_path / "slow.py", "a") as plugin:
        plugin.write('\nif "DRIVER" not in os.environ:\n    raise ValueError("no licence on this node")\n')
    call += [str(tmp_path / "there"), "--executor", "ray", "--jobs", "1"]
    found = subprocess.run(call, env={**os.environ, "DRIVER": "1"}, capture_output=True, text=True)
    assert found.returncode == 2 and "no licence on this node" in found.stderr.splitlines()[-1], found.stderr
    assert "Traceback" not in found.stderr
    refused = subprocess.run(
        [*call, "--device", "cuda"], env={**os.environ, "DRIVER": "1"}, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "no node of the Ray cluster has one" in refused.stderr, refused.stderr


@needs_ray
def test_a_leaderboard_is_made_on_a_cluster(tmp_path, three_nodes):
    call = [sys.executable, "-m", "dpft.harness", "run", "tiny", "--results", str(tmp_path), "--executor", "ray"]
    found = subprocess.run([*call, "--budget", "20s"], capture_output=True, text=True)
    assert found.returncode == 0 and "the same command goes on" in found.stderr, found.stderr
    assert list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.ckpt"))

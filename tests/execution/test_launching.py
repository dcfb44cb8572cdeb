"""`dpft run --ranks 2`: whatever ends one of its processes ends all, with one sentence, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forks import alive, children

RUN = ["run", "--task", "low-rank", "--method", "non-private", "--steps", "100000", "--set", "eval_every=100000"]
RUN += ["--batch-size", "64", "--ranks", "2", "--checkpoint-every", "0.2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [[], ["--model", "layers", "--method", "last-layer", "--epsilon", "3", "--shard-model"]],
    ids=["whole", "sharded"],
)
def test_a_killed_rank_ends_all_with_one_sentence(more, tmp_path):
    command = [sys.executable, "-m", "dpft.harness", *RUN, *more, "--results", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    everyone = [process.pid, *sorted(children(process.pid))]
    assert len(everyone) == 3
    os.kill(everyone[2], signal.SIGKILL)
    begun = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30 and not any(map(alive, everyone)), "it works on for nobody"
    said = "dpft: Rank 1 was ended by SIGKILL, so all 2 ended; finished runs are kept, the same command continues."
    assert (process.returncode, output, errors.splitlines()[1:]) == (2, "", [said])
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--jobs", "2"], "does not go with --jobs; take one of them"),
        (["--executor", "ray"], "does not go with --executor ray; take one of them"),
        (["--replay", "23474229a0e2dfe2"], "does not go with --replay; take one of them"),
        (["--device", "cuda:1"], "write --device cuda, not cuda:1"),
        (["--shard-model", "--engine", "opacus"], "does not go with --engine opacus, which wraps the layers itself"),
        (["--shard-model", "--ranks", "1"], "parts the model among ranks, and this run has one process; add --ranks 2"),
    ],
)
def test_what_does_not_go_with_ranks_is_refused_at_once(dpft, tmp_path, more, why):
    code, output, errors = dpft(*RUN, "--results", tmp_path / "runs", *more)
    assert (code, output) == (2, "") and why in errors and not (tmp_path / "runs").exists()

"""Every method trains on a card without waiting for it: proven without one (tests/cases/cards.py says how)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpft.harness.runs import registry

ROOT = Path(__file__).parents[2]
METHODS = [name for name in registry.methods() if registry.method(name).private]
OTHERS = [
    "non-private",
    "dp-adam,clip_groups=layer",
    "dp-adam,clipping=quantile",
    "dp-adam,clipping=slaclip",
    "dp-adam,mechanism=laplace",
    "dp-fest,optimizer=sgd,momentum=0.9",
    "dp-adam,sampler=cyclic,bands=2",
    "checked:dp-lora",
]
# Looks that an ordinary step has before its update, at most. They decide how much work there is (rows that are touched, singular
# values above the noise), are a bound or a draw that is a Python number, or are decompositions, which say whether they converged.
SPECTRAL = 20  # in all; at most 3 for every shape of matrices, and 1 for each that stands out
BEFORE = {
    "dp-adafest": 7,
    "prism": 36,
    **dict.fromkeys([name for name in METHODS if name.startswith(("rmt", "profile"))], SPECTRAL),
    "dp-adam,clipping=quantile": 1,
    "dp-adam,clipping=slaclip": 1,
    "dp-adam,mechanism=laplace": 1,
}
EVALUATED = 30  # looks that an evaluated step has beside, however many parameters there are


@pytest.fixture(scope="module")
def runs(mirror, tiny_bert):
    """Names of runs -> what card_runs.py says of each, made in a process of its own: a device is registered for good."""

    def made(names):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cases")])
        command = [sys.executable, str(ROOT / "tests/cases/card_runs.py"), str(mirror), str(tiny_bert), *names]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}

    return made


@pytest.mark.parametrize("part", range(3))
def test_a_step_waits_for_the_card_once_when_its_update_is_queued(runs, part):
    names = [*METHODS, *OTHERS][part::3]
    found = runs(names)
    assert list(found) == names
    for name, one in found.items():
        assert one["status"] == "done", (name, one["error"])
        before = one["before"]["ordinary"]
        assert len(before) <= BEFORE.get(name, 0), (name, before)
        assert len(one["all"]["ordinary"]) <= len(before) + 1, (name, one["all"]["ordinary"])
        if not name.startswith("checked:"):  # there a step is compared with autograd, example by example
            assert len(one["all"]["evaluated"]) <= EVALUATED + BEFORE.get(name, 0), (name, one["all"]["evaluated"])
        assert one["cards"] == [0] and one["asked"] == [1, 1, 1], (name, "timed or counted on another card")


def test_what_is_planted_is_found(runs):
    behind = "left_behind:dp-fest,optimizer=sgd,momentum=0.9"
    planted = ("a_number", "a_branch", "pageable", "another_card", "tensor_by_tensor")
    found = runs([*(f"{name}:dp-adam" for name in planted), behind])  # one process: a second is slow to start
    for name in ("a_number", "a_branch", "pageable"):
        assert found[f"{name}:dp-adam"]["before"]["ordinary"], name
    assert found["another_card:dp-adam"]["cards"] == [0, 1]
    assert len(found["tensor_by_tensor:dp-adam"]["all"]["evaluated"]) > EVALUATED
    left = found[behind]
    assert left["status"] == "error" and "same device" in left["error"]


def test_what_is_looked_at_late_still_ends_the_run_before_it_says_anything(runs):
    found = runs([f"{name}:dp-adam" for name in ("not_finite", "infinite_update", "remembered")])
    loss, update, buffer = found.values()
    assert (loss["status"], loss["rows"]) == ("diverged", 2) and "loss or gradient" in loss["error"]
    assert (update["status"], update["rows"]) == ("diverged", 2) and "update" in update["error"]
    assert (buffer["status"], buffer["rows"]) == ("error", 2) and "changed while private gradients" in buffer["error"]

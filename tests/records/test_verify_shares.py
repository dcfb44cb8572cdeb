"""Records of runs that release several things a step: fine as they are made, and what is forged in them is found."""

import copy
import json
import math
import subprocess
import sys

import pytest
import shared_budget_cases as cases
from forged_cases import put

from dpft.harness.privacy import Ledger, Release, certify, merged_noise_multiplier, verify_record
from dpft.harness.records.verifying import verify_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(plug-in file, record, rows)."""
    path = cases.register(tmp_path_factory.mktemp("plugin"))
    yield path, *cases.shared_record()
    cases.unregister()


@pytest.fixture
def shared(made):
    return copy.deepcopy(made[1:])


def test_a_run_with_several_kinds_of_steps_is_fine(shared):
    record, rows = shared
    privacy = record["privacy"]
    assert privacy["releases_per_step"] is None and len(privacy["ledger"]) == 9 and privacy["within_budget"]
    assert {len(event["releases"]) for event in privacy["ledger"]} == {1, 2}
    found = verify_run(record, rows)
    assert found.findings == [] and found.notices == []


def test_without_torch(made, tmp_path):
    plugin, record, rows = made
    put(tmp_path / "runs", record, rows)
    forgery = copy.deepcopy(record)
    swap(forgery["privacy"]["ledger"], "count", "votes")
    forgery["run_id"] = record["run_id"]
    cases.chained(forgery, rows)
    put(tmp_path / "forged", forgery, rows)
    script = (
        "import sys, polars\n"
        "from pathlib import Path\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'opacus'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from dpft.harness.runs import registry\n"
        f"registry.load_plugin({str(plugin)!r})\n"
        "from dpft.harness.records.verifying import verify_folder\n"
        f"(fine,) = verify_folder(Path({str(tmp_path / 'runs')!r})).values()\n"
        "assert not fine.findings and not fine.notices, fine\n"
        f"(forged,) = verify_folder(Path({str(tmp_path / 'forged')!r})).values()\n"
        "assert 'declares' in forged.findings[0], forged\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def swap(events, old, new):
    for event in events:
        for release in event["releases"]:
            release["name"] = new if release["name"] == old else release["name"]


def shares_of(record, first, second, share):
    """Every step's releases of these two names with other shares, merging to the same."""
    sigma = record["privacy"]["noise_multiplier"]
    for event in record["privacy"]["ledger"]:
        names = {release["name"]: release for release in event["releases"]}
        if {first, second} <= names.keys():
            names[first]["noise_multiplier"] = sigma / math.sqrt(share)
            names[second]["noise_multiplier"] = sigma / math.sqrt(1 - share)


def raised(record, rows):
    shares_of(record, "count", "gradient", 0.05)
    remerged(record)


def remerged(record):
    """Each event says what its releases merge to, and the section what all of them cost."""
    privacy = record["privacy"]
    for event in privacy["ledger"]:
        event["noise_multiplier"] = merged_noise_multiplier(Release(**release) for release in event["releases"])
    privacy |= certify(privacy["ledger"], privacy["delta"], privacy["target"], 2)


def raised_without_another_giving_way(record, rows):
    """More of the budget for the count alone: the step spends more than it says."""
    for event in record["privacy"]["ledger"]:
        for release in event["releases"]:
            release["noise_multiplier"] *= 0.5 if release["name"] == "count" else 1


def dropped(record, rows):
    """The counts are left out, in every number."""
    for event in record["privacy"]["ledger"]:
        event["releases"] = [release for release in event["releases"] if release["name"] != "count"]
    remerged(record)


def dropped_and_the_rest_lowered(record, rows):
    """Nobody would know from the ledger alone: the gradient takes the whole step."""
    sigma = record["privacy"]["noise_multiplier"]
    for event in record["privacy"]["ledger"]:
        if event["step_from"] >= 5:
            event["releases"] = [{**event["releases"][0], "noise_multiplier": sigma}]
    remerged(record)


def renamed(record, rows):
    swap(record["privacy"]["ledger"], "count", "votes")


def renamed_to_a_name_of_another_step(record, rows):
    swap(record["privacy"]["ledger"], "count", "vote")
    remerged(record)


def twice(record, rows):
    swap(record["privacy"]["ledger"], "count", "gradient")
    remerged(record)


def merged_lies(record, rows):
    for event in record["privacy"]["ledger"]:
        event["noise_multiplier"] *= 1.01


def all_merged_lie(record, rows):
    merged_lies(record, rows)
    record["privacy"]["noise_multiplier"] *= 1.01


def less_noise_everywhere(record, rows):
    for event in record["privacy"]["ledger"]:
        for release in event["releases"]:
            release["noise_multiplier"] *= 0.97
    record["privacy"]["noise_multiplier"] *= 0.97
    for event in record["privacy"]["ledger"]:
        event["noise_multiplier"] = merged_noise_multiplier(Release(**release) for release in event["releases"])


def moved(record, rows):
    """The votes end a step later, and the counts begin a step later."""
    ledger = record["privacy"]["ledger"]
    ledger[0]["step_to"] = ledger[1]["step_from"] = 6
    remerged(record)


def in_units(record, rows):
    record["privacy"]["ledger"][1]["releases"][1]["sensitivity_ratio"] = 0.1


def said_to_be_two(record, rows):
    record["privacy"]["releases_per_step"] = 2


def tail_of_one(record, rows):
    """The tail as if a step made one release."""
    (event, *_), privacy = record["privacy"]["ledger"], record["privacy"]
    whole = {**event, "step_to": 40, "releases": event["releases"][:1]}
    privacy["tail_delta"] = certify(remade(whole), privacy["delta"], privacy["target"], 2)["tail_delta"]


def remade(event):
    (release,) = event["releases"]
    return [{**event, "noise_multiplier": release["noise_multiplier"]}]


def curve_of_more_noise(record, rows):
    """The curve's epsilon lowered on the way: at its ends it is as it was."""
    for row in rows[3:15]:
        row["epsilon"] = rows[2]["epsilon"]


FORGED = {
    raised: "declares gradient",
    raised_without_another_giving_way: "its releases merge to",
    dropped: "have noise_multiplier",
    dropped_and_the_rest_lowered: "declares gradient",
    renamed: "declares gradient",
    renamed_to_a_name_of_another_step: "declares gradient",
    twice: "release the same name twice: gradient, gradient",
    merged_lies: "its releases merge to",
    all_merged_lie: "its releases merge to",
    less_noise_everywhere: "epsilon is recorded as",
    moved: "Step 5 of the ledger releases vote",
    in_units: "sensitivity_ratio 1",
    said_to_be_two: "make 1 releases each, but releases_per_step is 2",
    tail_of_one: "tail_delta",
    curve_of_more_noise: "of the curve has epsilon",
}


@pytest.mark.parametrize("forge", FORGED)
def test_every_forgery_is_found(forge, shared):
    record, rows = shared
    forge(record, rows)
    cases.chained(record, rows)
    findings = verify_run(record, rows).findings
    assert any(FORGED[forge] in one for one in findings), findings
    assert all(one.endswith(".") and "cannot be verified" not in one for one in findings)


def test_lost_releases_may_be_of_any_step_that_the_method_has_and_of_no_other(shared):
    """A killed process's releases push the others back: the ledger's step is then not the method's."""
    from dpft.harness.records.verifying import declared
    from dpft.harness.records.verifying.asked import read

    record, _ = shared
    privacy = record["privacy"]
    privacy["ledger"][0]["step_to"] = privacy["ledger"][1]["step_from"] = 7
    assert list(declared.findings(record, read(record)))
    privacy["steps_lost"] = 2
    assert list(declared.findings(record, read(record))) == []
    swap(privacy["ledger"], "count", "votes")
    assert list(declared.findings(record, read(record)))


def test_what_another_version_of_the_method_declared_is_not_known(shared, monkeypatch):
    record, rows = shared
    from dpft.harness.runs import registry

    monkeypatch.setattr(registry.methods()[cases.NAME], "version", 2)
    renamed(record, rows)
    cases.chained(record, rows)
    found = verify_run(record, rows)
    assert found.findings == [] and "version 1 of method" in found.notices[0]


def test_the_ledger_says_how_many_releases_a_step_makes_and_what_was_booked():
    ledger = Ledger()
    assert ledger.releases_per_step == 1 and ledger.booked(0) is None
    two = [Release(name=name, noise_multiplier=2.0) for name in ("gradient", "count")]
    for step in range(4):
        ledger.append(step, 0.1, two)
    assert ledger.releases_per_step == 2
    ledger.append(4, 0.1, two[:1])
    assert ledger.releases_per_step is None
    assert [ledger.booked(step)["step_to"] for step in range(5)] == [1, 2, 3, 4, 5]
    assert len(ledger.booked(3)["releases"]) == 2 and len(ledger.booked(4)["releases"]) == 1
    assert ledger.booked(5) is None and ledger.booked(-1) is None


def test_a_foreign_record_may_name_its_releases_as_it_likes(shared):
    privacy = shared[0]["privacy"]
    events = json.loads(json.dumps(privacy["ledger"]))
    for event in events:
        for release in event["releases"]:
            release |= {"name": "g", "sensitivity_ratio": 0.5}
    kept = {key: privacy[key] for key in ("target", "delta", "epsilon", "noise_stream", "tail_delta")}
    assert verify_record({"privacy": {**kept, "ledger": events}}) == []

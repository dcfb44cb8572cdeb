"""What other data, batches, steps and budgets would buy: the same figures as planning each of them."""

import dataclasses
import json

import pytest

from dpft.harness.errors import BadInput
from dpft.harness.runs import levels, planner
from dpft.harness.runs.plan import plan
from dpft.harness.runs.planner import CHANGES, alternatives, samplers, samplers_table, table
from dpft.harness.runs.resolve import resolve

N = 4000


def a_spec(**more):
    return resolve({"task": "sst2", "method": "dp-adam", "epsilon": 3.0, "batch_size": 200, "steps": 16, **more})


def test_rows_are_what_planning_them_says():
    spec = a_spec()
    rows = {row["change"]: row for row in alternatives(spec, N)}
    assert list(rows) == [said for said, _ in CHANGES]
    twice = plan(dataclasses.replace(spec, batch_size=400), None, num_examples=N)
    assert rows["twice the batch"]["sigma"] == twice.noise_multiplier
    assert rows["twice the batch"]["sigma/B"] == twice.noise_multiplier / 400
    assert rows["as planned"]["noise"] == rows["as planned"]["work"] == 1.0
    assert rows["twice the batch"]["work"] == 2.0 and rows["twice the batch, half the steps"]["work"] == 1.0
    noise = {said: row["noise"] for said, row in rows.items()}
    assert noise["four times the batch"] < noise["twice the batch"] < 1 < noise["half the batch"]
    assert noise["twice the examples"] < 1 < noise["half the examples"]
    assert noise["half the steps"] < 1 < noise["twice the steps"]
    assert noise["twice the epsilon"] < 1 < noise["half the epsilon"]
    assert all(line["σ"] != "–" for line in table(list(rows.values())))


def test_what_cannot_be_says_why(monkeypatch):
    monkeypatch.setattr(planner, "CHANGES", (CHANGES[0], CHANGES[3]))
    rows = {row["change"]: row for row in alternatives(a_spec(batch_size=2500), N)}
    assert "larger than the 4000" in rows["twice the batch"]["problem"] and rows["twice the batch"]["noise"] is None
    assert table([rows["twice the batch"]])[0]["σ/B"] == "–"
    with pytest.raises(BadInput, match="not private"):
        alternatives(a_spec(method="non-private"), N)


def test_the_command_prints_it_for_one_setting(dpft, monkeypatch):
    monkeypatch.setattr(planner, "CHANGES", CHANGES[:2])
    setting = ("--task", "sentences", "--method", "dp-adam", "--batch-size", "256", "--steps", "16")
    code, out, err = dpft("plan", *setting, "--epsilon", "8", "--what-if")
    assert code == 0 and "twice the examples" in out and "× 1.00" in out
    code, out, err = dpft("plan", *setting, "--epsilon", "8,3", "--what-if")
    assert code == 2 and "these runs have 2" in err
    code, out, err = dpft("plan", *setting, "--what-if", "--set", "unit=user", "--set", "group_size=2")
    assert code == 2 and "--what-if counts examples" in err


def test_samplers_are_priced_as_planning_them_says(monkeypatch):
    monkeypatch.setattr(planner, "SAMPLERS", (("poisson", {}), ("truncated", {"cut": 1.1}), ("cyclic", {"bands": 8})))
    spec = a_spec(epsilon=8.0)
    poisson, cut, banded = samplers(spec, N)
    planned = plan(dataclasses.replace(spec, sampler="cyclic", bands=8), None, num_examples=N)
    assert (
        banded["sigma"] == planned.noise_multiplier and banded["price"] > 1 and cut["price"] > 1 and cut["cap"] == 220
    )
    assert poisson["price"] == poisson["step"] == poisson["sums"] == 1.0
    assert banded["sums"] < 0.9 < 1.2 < banded["step"], "less noise in sums, more in each step"
    assert [line["sampler"] for line in samplers_table([poisson, banded])] == ["poisson", "cyclic, bands 8"]
    monkeypatch.setattr(planner, "SAMPLERS", planner.SAMPLERS[2:])
    [refused] = samplers(dataclasses.replace(spec, method="dp-grape"), N)
    assert "in a space that changes" in refused["problem"] and samplers_table([refused])[0]["σ"] == "–"
    assert "from one of 8 groups" in samplers(dataclasses.replace(spec, batch_size=600), N)[0]["problem"]


def test_the_command_prints_samplers(dpft, monkeypatch):
    monkeypatch.setattr(planner, "SAMPLERS", planner.SAMPLERS[:1] + planner.SAMPLERS[-4:-3])
    setting = ("--task", "sentences", "--method", "dp-adam", "--batch-size", "256", "--steps", "16", "--epsilon", "8")
    code, out, err = dpft("plan", *setting, "--samplers")
    assert code == 0 and "cyclic, bands 2" in out and "× 1.0000" in out and "Price: sigma over Poisson's" in out, err


def test_the_command_says_what_protecting_users_costs(dpft, monkeypatch):
    monkeypatch.setattr(levels, "GROUP_SIZES", (1, 2))
    setting = ("--task", "digits", "--method", "dp-adam", "--batch-size", "80", "--steps", "4", "--epsilon", "8")
    code, out, err = dpft("plan", *setting, "--set", "user_rows=8", "--users")
    assert code == 0 and "nobody real" in out and "| 2   | 100     | 200        | 80," in out
    code, out, err = dpft("plan", *setting, "--users", "--json")
    rows = json.loads(out)
    assert [row["group_size"] for row in rows] == [1, 2] and rows[1]["users"] == 400
    assert rows[0]["els"]["sigma"] == rows[0]["uls"]["sigma"]
    code, out, err = dpft(
        "plan", *setting, "--set", "unit=user", "--set", "group_size=2", "--set", "user_rows=8", "--users"
    )
    assert code == 2 and "leave out unit" in err

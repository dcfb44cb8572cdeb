"""The ledger: order, encoding, refusals."""

import json
import math

import pytest
from privacy_cases import events_of, gaussian, ledger_of

from dpft.harness.errors import BadInput
from dpft.harness.privacy import Ledger, Release, merged_noise_multiplier

pytestmark = pytest.mark.usefixtures("own_cache")


def test_ledger_is_run_length_encoded_and_round_trips():
    ledger = ledger_of((3, 0.1, gaussian(1.0)), (2, 0.1, gaussian(1.0, 2.0)), (1, 0.2, gaussian(1.0, 2.0)))
    events = ledger.events
    assert [(event["step_from"], event["step_to"]) for event in events] == [(0, 3), (3, 5), (5, 6)]
    assert ledger.steps == 6
    assert events[0] == {
        "step_from": 0,
        "step_to": 3,
        "sampling_probability": 0.1,
        "mechanism": "gaussian",
        "noise_multiplier": 1.0,
        "releases": [{"name": "r0", "mechanism": "gaussian", "noise_multiplier": 1.0, "sensitivity_ratio": 1.0}],
    }
    assert Ledger.from_events(json.loads(json.dumps(events))).events == events
    split = [{**events[0], "step_to": 1}, {**events[0], "step_from": 1}]
    assert Ledger.from_events(split).events == events[:1]
    assert Ledger.from_events([]).steps == 0


def test_ledger_cannot_be_changed_from_outside():
    ledger = ledger_of((2, 0.1, gaussian(1.0)))
    ledger.events[0]["step_to"] = 1
    ledger.events[0]["releases"].clear()
    assert ledger.events[0]["step_to"] == 2 and ledger.events[0]["releases"]


@pytest.mark.parametrize("step", [0, 1, 3, -1])
def test_ledger_takes_only_the_next_step(step):
    ledger = ledger_of((2, 0.1, gaussian(1.0)))
    with pytest.raises(ValueError, match="the next is 2"):
        ledger.append(step, 0.1, gaussian(1.0))
    assert ledger.steps == 2


@pytest.mark.parametrize(
    "q, releases", [(0.0, gaussian(1.0)), (1.1, gaussian(1.0)), (math.nan, gaussian(1.0)), (0.1, [])]
)
def test_ledger_refuses_meaningless_steps(q, releases):
    ledger = Ledger()
    with pytest.raises(ValueError):
        ledger.append(0, q, releases)
    assert ledger.steps == 0


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, "1", True])
def test_release_needs_a_finite_positive_noise_multiplier(sigma):
    with pytest.raises(ValueError, match="noise_multiplier"):
        Release(name="sum", noise_multiplier=sigma)


def test_release_refuses_what_cannot_be_accounted():
    with pytest.raises(ValueError, match="laplace"):
        Release(name="sum", mechanism="laplace", noise_multiplier=1.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step_from": 1}, "do not continue from step 0"),
        ({"step_to": 0}, "do not continue"),
        ({"step_to": 2.0}, "do not continue"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": 1.5}, "sampling_probability"),
        ({"sampling_probability": None}, "sampling_probability"),
        ({"noise_multiplier": 1.01}, "merge to 1"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"mechanism": "laplace"}, "laplace"),
        ({"releases": []}, "at least one release"),
        ({"releases": [{"name": "x"}]}, "keys"),
        ({"extra": 1}, "keys"),
    ],
)
def test_malformed_events_are_bad_input(change, words):
    event = {**events_of(0.1, 1.0, 2)[0], **change}
    with pytest.raises(BadInput, match=words):
        Ledger.from_events([event])


def test_gap_between_events_is_bad_input():
    first, second = ledger_of((2, 0.1, gaussian(1.0)), (2, 0.1, gaussian(2.0))).events
    with pytest.raises(BadInput, match="Event 1 .* do not continue from step 2"):
        Ledger.from_events([first, {**second, "step_from": 3}])


def test_merged_noise_multiplier():
    assert merged_noise_multiplier(gaussian(1.7)) == 1.7
    assert merged_noise_multiplier(gaussian(3.0, 4.0)) == pytest.approx(2.4, rel=1e-12)
    k = 9
    assert merged_noise_multiplier(gaussian(*[6.0] * k)) == pytest.approx(6.0 / math.sqrt(k), rel=1e-12)
    with pytest.raises(ValueError):
        merged_noise_multiplier([])

"""What verification says of noise: its stream, what its tail lacks, and releases that were lost."""

import copy
import dataclasses

import pytest
from small_runs import a_spec, quiet

from dpft.harness.records.verifying import verify_run
from dpft.harness.train import run


@pytest.fixture(scope="module")
def made(tiny_bert, mirror):
    from dpft.harness.train.settings import Settings

    return run.execute(a_spec("last-layer", tiny_bert), Settings(data_dir=mirror), quiet)


def verdict(made, **changes):
    record, curve = copy.deepcopy(made)
    record["privacy"].update(changes)
    return verify_run(record, [{**dict.fromkeys(curve[-1]), **row} for row in curve])


def test_a_new_record_is_fine_and_has_no_notice(made):
    found = verdict(made)
    assert (found.findings, found.notices) == ([], [])
    assert made[0]["privacy"]["noise_stream"] == 2 and 0 < made[0]["privacy"]["tail_delta"] < 1e-9


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"noise_stream": 1}, "noise_stream is 1, but the spec asks for 2"),
        ({"noise_stream": 3}, "does not know"),
        ({"tail_delta": 0.0}, "tail_delta is 0.0, but noise of stream 2 lacks"),
        ({"tail_delta": "none"}, "must be a number"),
        ({"steps_lost": 1}, "steps_run is 4, 1 of them lost"),
        ({"steps_lost": -1}, "must be a whole number"),
    ],
)
def test_what_is_said_of_the_noise_must_follow(made, changes, words):
    assert any(words in one for one in verdict(made, **changes).findings)


def test_old_noise_is_told_with_what_it_costs(tiny_bert, settings):
    old = dataclasses.replace(a_spec("last-layer", tiny_bert), noise_stream=1, epsilon=8.0)
    record, curve = run.execute(old, settings, quiet)
    found = verify_run({**record, "chain": record["chain"]}, [{**dict.fromkeys(curve[-1]), **row} for row in curve])
    assert found.findings == [] and "ends at 5.77 sigma" in found.notices[-1]

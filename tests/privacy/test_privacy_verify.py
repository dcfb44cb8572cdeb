"""The privacy section: every tampering with it is found."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verify_cases import BATCH, DELTA, SIGMA, STEPS, TARGET, N, edit, edits, findings_of, honest_record, scale

from dpft.harness.privacy import Ledger, Release, certify, epsilon_curve, verify_record


@pytest.fixture(scope="module")
def honest():
    return honest_record()


def test_an_honest_record_has_no_findings(honest):
    assert verify_record(honest, STEPS) == []
    assert verify_record(honest, None) == []


def test_a_run_that_stopped_early_is_honest_too(honest):
    ledger = Ledger()
    for step in range(7):
        ledger.append(step, BATCH / N, [Release(name="gradient", noise_multiplier=SIGMA)])
    certificate = certify(ledger.events, DELTA, TARGET)
    record = copy.deepcopy(honest)
    record["privacy"].update(steps_run=7, ledger=ledger.events, epsilon_at_threshold=None)
    record["privacy"].update({key: certificate[key] for key in ("epsilon", "cross_checks")})
    assert verify_record(record, 7) == []


def test_a_non_private_record_has_no_findings():
    assert verify_record({"privacy": None}, 10) == []
    done = {"schema": 1, "status": "done", "privacy": None}
    assert verify_record({**done, "spec": {"epsilon": None}}) == []
    assert len(findings_of({**done, "spec": {"epsilon": 3.0}})) == 1


EVENT = ("ledger", 0)
SIGMA_IN_LEDGER = [
    ((*EVENT, "noise_multiplier"), scale(0.9)),
    ((*EVENT, "releases", 0, "noise_multiplier"), scale(0.9)),
]
Q_IN_LEDGER = [((*EVENT, "sampling_probability"), scale(1.2))]


@pytest.mark.parametrize(
    "changes, words",
    [
        pytest.param([(("epsilon", 2), 2.0)], "The upper epsilon is recorded as 2", id="upper"),
        pytest.param([(("epsilon",), lambda old: [x - 0.5 for x in old])], "The estimate epsilon", id="all-three"),
        pytest.param([(("epsilon",), lambda old: old[::-1])], "order", id="order"),
        pytest.param([((*EVENT, "noise_multiplier"), scale(0.9))], "its releases merge to 1", id="merged-sigma"),
        pytest.param(SIGMA_IN_LEDGER, "the record declares 1.0", id="sigma-in-ledger"),
        pytest.param([(("noise_multiplier",), 0.9)], "the record declares 0.9", id="declared-sigma"),
        pytest.param([*SIGMA_IN_LEDGER, (("noise_multiplier",), 0.9)], "but the ledger gives", id="sigma-everywhere"),
        pytest.param([((*EVENT, "step_to"), STEPS - 1)], "books 39 steps, but steps_run is 40", id="count"),
        pytest.param([(("steps_run",), STEPS - 1)], "books 40 steps, but steps_run is 39", id="steps-run"),
        pytest.param([(("steps_planned",), STEPS - 1)], "more than the 39 planned", id="steps-planned"),
        pytest.param(
            [((*EVENT, "step_to"), 60), (("steps_run",), 60), (("steps_planned",), 60)],
            "The lower epsilon",
            id="more-steps-everywhere",
        ),
        pytest.param([(("sampling_probability",), scale(1.2))], "not expected_batch_size / num_examples", id="q"),
        pytest.param(Q_IN_LEDGER, "have sampling_probability", id="q-in-ledger"),
        pytest.param(
            [*Q_IN_LEDGER, (("sampling_probability",), scale(1.2)), (("expected_batch_size",), 60)],
            "but the ledger gives",
            id="q-everywhere",
        ),
        pytest.param([(("num_examples",), N + 1)], "not expected_batch_size / num_examples", id="N"),
        pytest.param([(("expected_batch_size",), BATCH + 1)], "not expected_batch_size", id="batch"),
        pytest.param([(("delta",), 2e-5)], "tolerance delta_error", id="delta-and-tolerance"),
        pytest.param([(("delta",), 2e-5), (("tolerance", "delta_error"), 2e-8)], "but the ledger gives", id="delta"),
        pytest.param(
            [(("num_examples",), 10**6), (("expected_batch_size",), 5 * 10**4)], "not under 1 / num_examples", id="1/N"
        ),
        pytest.param([(("target",), 1.0)], "exceeds the target 1", id="target"),
        pytest.param([(("adjacency",), "none")], "adjacency", id="adjacency"),
        pytest.param([(("sampling",), "shuffle")], "sampling is 'shuffle'", id="sampling"),
        pytest.param([(("releases_per_step",), 2)], "make 1 releases each", id="releases"),
        pytest.param([((*EVENT, "releases"), [])], "at least one release", id="no-releases"),
        pytest.param([(("ledger",), [])], "books 0 steps", id="empty-ledger"),
        pytest.param([((*EVENT, "step_from"), 1)], "do not continue from step 0", id="gap"),
        pytest.param([(("cross_checks", "pld"), 1.0)], "cross-check pld", id="pld"),
        pytest.param([(("cross_checks", "opacus_prv"), 1.0)], "cross-check opacus_prv", id="opacus"),
        pytest.param([(("tolerance", "eps_error"), 1.0)], "tolerance eps_error", id="tolerance"),
        pytest.param([(("epsilon_at_threshold",), 5.0)], "epsilon_at_threshold", id="threshold"),
        pytest.param(
            [(key, 0.2) for key, _ in SIGMA_IN_LEDGER] + [(("noise_multiplier",), 0.2)],
            "cannot be recomputed from the ledger: Cannot certify noise multiplier 0.2",
            id="uncertifiable",
        ),
    ],
)
def test_tampering_is_found(honest, changes, words):
    findings = findings_of(edits(honest, *changes))
    assert any(words in finding for finding in findings), findings


def test_a_curve_of_another_length_is_found(honest):
    assert findings_of(honest, STEPS - 1) == ["The curve holds 39 steps, but steps_run is 40."]


def test_every_key_is_needed_and_no_content_raises(honest):
    for key in honest["privacy"]:
        record = copy.deepcopy(honest)
        del record["privacy"][key]
        assert findings_of(record) == [f"The privacy section lacks {key}."]
        for junk in ("x", [], {}, float("nan"), float("inf"), -1, True, 10**400, [None] * 3):
            if (key, junk) != ("within_budget", True):
                assert findings_of(edit(honest, (key,), junk), STEPS) != [], (key, junk)
    for record in ({}, [], None, {"privacy": []}, {"privacy": "x"}, {"privacy": {}}):
        assert len(findings_of(record)) == 1


@pytest.mark.parametrize("target, delta, steps", [(1e-9, 1e-5, 40), (4.0, 1e-300, 40), (4.0, 1e-5, 10**300)])
def test_absurd_numbers_cost_nothing(honest, target, delta, steps):
    record = edits(
        honest,
        (("target",), target),
        (("delta",), delta),
        ((*EVENT, "step_to"), steps),
        (("tolerance",), {"eps_error": min(0.01, target / 50), "delta_error": delta / 1000}),
    )
    assert any("cannot be recomputed" in finding for finding in findings_of(record))


RATIO, STEP_FROM, STEP_TO = (*EVENT, "releases", 0, "sensitivity_ratio"), (*EVENT, "step_from"), (*EVENT, "step_to")
SINGLE = [
    ("noise_multiplier",),
    (*EVENT, "noise_multiplier"),
    (*EVENT, "releases", 0, "noise_multiplier"),
    ("sampling_probability",),
    (*EVENT, "sampling_probability"),
    ("num_examples",),
    ("expected_batch_size",),
    ("delta",),
    ("target",),
    ("releases_per_step",),
    RATIO,
    STEP_FROM,
    STEP_TO,
    ("epsilon", 0),
    ("epsilon", 1),
    ("epsilon", 2),
    ("steps_run",),
    ("steps_planned",),
    ("epsilon_at_threshold",),
    ("cross_checks", "pld"),
    ("cross_checks", "opacus_prv"),
    ("tolerance", "eps_error"),
    ("tolerance", "delta_error"),
]
# what a forger changes together, so that the entries agree with one another
TOGETHER = [
    [("noise_multiplier",), (*EVENT, "noise_multiplier"), (*EVENT, "releases", 0, "noise_multiplier")],
    [("sampling_probability",), (*EVENT, "sampling_probability"), ("expected_batch_size",)],
    [("num_examples",), ("expected_batch_size",)],
    [STEP_TO, ("steps_run",), ("steps_planned",)],
    [STEP_TO, ("steps_run",)],
    [("delta",), ("tolerance", "delta_error")],
    [("epsilon", 0), ("epsilon", 1), ("epsilon", 2)],
    [("epsilon", 0), ("epsilon", 1), ("epsilon", 2), ("cross_checks", "pld"), ("cross_checks", "opacus_prv")],
]


@pytest.fixture(scope="module")
def finished(honest):
    """The honest record as a whole: of a run that is done and reached its threshold after 10 steps."""
    record = edit(honest, ("epsilon_at_threshold",), curve()[9])
    return record | {"status": "done", "result": {"steps_to_threshold": 10}}


def curve():
    return epsilon_curve(SIGMA, BATCH / N, STEPS, DELTA, TARGET)[1:]


def changed(value, factor):
    return round(value * factor) if type(value) is int and round(value * factor) != value else value * factor or 1


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    paths=st.one_of(st.sampled_from(SINGLE).map(lambda path: [path]), st.sampled_from(TOGETHER)),
    percent=st.integers(2, 300),
    up=st.booleans(),
)
def test_every_tampering_of_two_percent_or_more_is_found(finished, paths, percent, up):
    """Of any entry alone, or of several at once so that they agree; null, a missing and a doubled entry are other tests."""
    assert verify_record(finished, STEPS, curve()) == []
    factor = 1 + percent / 100 if up else 1 / (1 + percent / 100)
    record = edits(finished, *[(path, lambda value: changed(value, factor)) for path in paths])
    if record != finished:
        assert verify_record(record, STEPS, curve()), (paths, factor)


@given(rows=st.integers(0, 200))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_every_other_number_of_rows_is_found(finished, rows):
    assert bool(verify_record(finished, rows)) == (rows != STEPS)


def test_what_the_result_and_the_curve_say_is_compared(finished):
    low = [TARGET * (t + 1) / 400 for t in range(STEPS)]
    assert any("curve ends at epsilon" in one for one in verify_record(finished, STEPS, low))
    assert any("falls" in one for one in verify_record(finished, STEPS, low[::-1]))
    assert any(
        "steps_to_threshold" in one for one in verify_record({**finished, "result": {"steps_to_threshold": None}})
    )
    assert any(
        "first 20 steps spend" in one for one in verify_record({**finished, "result": {"steps_to_threshold": 20}})
    )
    assert any("took 39 of" in one for one in findings_of(edits(finished, (("steps_run",), 39), (STEP_TO, 39))))
    assert any("not certified" in one for one in findings_of(edit(finished, ("within_budget",), False)))
    assert any("may be only where" in one for one in findings_of(edit(finished, ("noise_multiplier",), None)))
    for key in ("epsilon", "batch_size", "steps", "delta"):
        assert findings_of({**finished, "spec": {**finished["spec"], key: 1.5}}), key

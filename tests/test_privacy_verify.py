"""Verification by a stranger: every tampering with a record is found, and torch is not needed."""

import copy
import json
import subprocess
import sys

import pytest

from dpft.harness.privacy import Ledger, Release, certify, verify_record

N, BATCH, SIGMA, STEPS, DELTA, TARGET = 1000, 50, 1.0, 40, 1e-5, 4.0


@pytest.fixture(scope="module")
def honest():
    """A record's privacy section as the loop writes it, after a trip through JSON."""
    ledger = Ledger()
    for step in range(STEPS):
        ledger.append(step, BATCH / N, [Release(name="sum", noise_multiplier=SIGMA)])
    certificate = certify(ledger.events, DELTA, TARGET)
    assert certificate["within_budget"]
    privacy = {
        "target": TARGET,
        "delta": DELTA,
        "adjacency": "zero-out, public N",
        "sampling": "poisson",
        "num_examples": N,
        "sampling_probability": BATCH / N,
        "expected_batch_size": BATCH,
        "noise_multiplier": SIGMA,
        "releases_per_step": 1,
        "steps_planned": STEPS,
        "steps_run": STEPS,
        "ledger": ledger.events,
        "epsilon_at_threshold": certificate["epsilon"][2] / 2,
        **{key: certificate[key] for key in ("epsilon", "cross_checks", "tolerance")},
    }
    return json.loads(json.dumps({"privacy": privacy}))


def edit(record, path, value):
    """A deep copy of `record` with the entry at `path` replaced, or changed by a function."""
    record = copy.deepcopy(record)
    at = record["privacy"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value(at[path[-1]]) if callable(value) else value
    return record


def edits(record, *changes):
    for path, value in changes:
        record = edit(record, path, value)
    return record


def findings_of(record, curve_steps=None):
    findings = verify_record(record, curve_steps)
    assert all(isinstance(finding, str) and finding.endswith(".") for finding in findings)
    return findings


def test_an_honest_record_has_no_findings(honest):
    assert verify_record(honest, STEPS) == []
    assert verify_record(honest, None) == []


def test_a_run_that_stopped_early_is_honest_too(honest):
    ledger = Ledger()
    for step in range(7):
        ledger.append(step, BATCH / N, [Release(name="sum", noise_multiplier=SIGMA)])
    certificate = certify(ledger.events, DELTA, TARGET)
    record = copy.deepcopy(honest)
    record["privacy"].update(steps_run=7, ledger=ledger.events, epsilon_at_threshold=None)
    record["privacy"].update({key: certificate[key] for key in ("epsilon", "cross_checks")})
    assert verify_record(record, 7) == []


def test_a_non_private_record_has_no_findings():
    assert verify_record({"privacy": None}, 10) == []


def scale(factor):
    return lambda value: value * factor


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


def test_neither_import_nor_verification_needs_torch(honest):
    script = (
        "import json, sys\n"
        "import dpft.harness.privacy as privacy\n"
        "heavy = {'torch', 'numpy', 'scipy', 'opacus', 'prv_accountant', 'dp_accounting'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'opacus'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "record = json.loads(sys.stdin.read())\n"
        "assert privacy.verify_record(record, 40) == [], privacy.verify_record(record, 40)\n"
        "record['privacy']['epsilon'][2] = 1.0\n"
        "assert privacy.verify_record(record, 40)\n"
        "section = record['privacy']\n"
        "certificate = privacy.certify(section['ledger'], section['delta'], section['target'])\n"
        "assert certificate['within_budget'] and certificate['cross_checks']['opacus_prv'] is None\n"
        "assert not {'torch', 'opacus'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(honest), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

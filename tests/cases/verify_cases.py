"""Records whose privacy section is real and whose other sections are not there, and how they are forged."""

import copy
import json

from dpft.harness.privacy import Ledger, Release, certify, verify_record

N, BATCH, SIGMA, STEPS, DELTA, TARGET = 1000, 50, 1.0, 40, 1e-5, 2.48  # epsilon 2.4783: calibrated


def honest_record():
    """A record's privacy section as the loop writes it, after a trip through JSON; no result, cost or curve."""
    ledger = Ledger()
    for step in range(STEPS):
        ledger.append(step, BATCH / N, [Release(name="gradient", noise_multiplier=SIGMA)])
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
        **{key: certificate[key] for key in ("epsilon", "cross_checks", "tolerance", "within_budget", "error")},
    }
    spec = {"epsilon": TARGET, "delta": DELTA, "batch_size": BATCH, "steps": STEPS}
    return json.loads(json.dumps({"schema": 1, "spec": spec, "privacy": privacy}))


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


def scale(factor):
    return lambda value: value * factor


def of_another_program(events, **more):
    certificate = certify(events, DELTA, TARGET)
    return {"privacy": {"ledger": events, "target": TARGET, "delta": DELTA, "epsilon": certificate["epsilon"], **more}}

"""Recompute a record's privacy claims from its ledger alone, as a stranger would; needs no torch."""

import math
import numbers
from collections.abc import Iterator
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.accountant import tolerance
from dpft.harness.privacy.certificate import ADJACENCY, SAMPLING, cross_checks, disagreement
from dpft.harness.privacy.ledger import Ledger
from dpft.harness.privacy.spent import epsilon

REL = 1e-9
INTEGERS = ("num_examples", "releases_per_step", "steps_planned", "steps_run")
REALS = ("target", "delta", "sampling_probability", "expected_batch_size", "noise_multiplier")
KEYS = (
    *INTEGERS,
    *REALS,
    "adjacency",
    "sampling",
    "ledger",
    "epsilon",
    "cross_checks",
    "tolerance",
    "epsilon_at_threshold",
)


def verify_record(record: dict[str, Any], curve_steps: int | None = None) -> list[str]:
    """What is wrong with a record's `privacy` section, one sentence each; empty when all is right (or null).

    The ledger is the truth: epsilon is recomputed from it with prv-accountant and with PLD, and every declared quantity
    is compared with it. `curve_steps`: the number of steps the run's curve file holds, where there is one. Never raises
    for what the record contains.
    """
    if not isinstance(record, dict) or "privacy" not in record:
        return ["The record has no privacy section."]
    privacy = record["privacy"]
    if privacy is None:
        return []
    findings = list(_shape(privacy))
    if findings:
        return findings
    findings = [*_declared(privacy), *_steps(privacy, curve_steps)]
    try:
        events = Ledger.from_events(privacy["ledger"]).events
    except BadInput as problem:
        return [*findings, str(problem)]
    findings += [*_events(privacy, events), *_epsilon(privacy, events)]
    return findings


def _shape(privacy: Any) -> Iterator[str]:
    """Missing keys and values of the wrong type: with any of these nothing else can be checked."""
    if not isinstance(privacy, dict):
        yield f"The privacy section must be an object or null, not {type(privacy).__name__}."
        return
    missing = [key for key in KEYS if key not in privacy]
    if missing:
        yield f"The privacy section lacks {', '.join(missing)}."
        return
    for key in INTEGERS:
        least = 0 if key == "steps_run" else 1
        if type(privacy[key]) is not int or not least <= privacy[key] <= 10**15:
            yield f"{key} must be a whole number of at least {least}, not {privacy[key]!r}."
    for key in REALS:
        if not _number(privacy[key]) or privacy[key] <= 0:
            yield f"{key} must be a finite positive number, not {privacy[key]!r}."
    values = privacy["epsilon"]
    if not isinstance(values, list) or len(values) != 3 or not all(map(_number, values)):
        yield f"epsilon must be [lower, estimate, upper], not {values!r}."
    for key, names in (("cross_checks", ("pld", "opacus_prv")), ("tolerance", ("eps_error", "delta_error"))):
        content = privacy[key]
        optional = key == "cross_checks"
        if not isinstance(content, dict) or any(
            name not in content or not (_number(content[name]) or (optional and content[name] is None))
            for name in names
        ):
            yield f"{key} must hold the numbers {' and '.join(names)}, not {content!r}."
    reached = privacy["epsilon_at_threshold"]
    if reached is not None and not _number(reached):
        yield f"epsilon_at_threshold must be a number or null, not {reached!r}."


def _declared(privacy: dict[str, Any]) -> Iterator[str]:
    """Declared quantities against each other."""
    if privacy["adjacency"] != ADJACENCY:
        yield f"adjacency is {privacy['adjacency']!r}; only {ADJACENCY!r} is certified."
    if privacy["sampling"] != SAMPLING:
        yield f"sampling is {privacy['sampling']!r}; only {SAMPLING!r} is certified."
    examples, batch, q = privacy["num_examples"], privacy["expected_batch_size"], privacy["sampling_probability"]
    if not math.isclose(q, batch / examples, rel_tol=REL):
        yield f"sampling_probability {q!r} is not expected_batch_size / num_examples = {batch!r} / {examples}."
    if privacy["delta"] >= 1 / examples:
        yield f"delta {privacy['delta']:g} is not under 1 / num_examples = {1 / examples:g}, so it promises nothing."
    rule = dict(zip(("eps_error", "delta_error"), tolerance(privacy["target"], privacy["delta"]), strict=True))
    for name, value in rule.items():
        declared = privacy["tolerance"][name]
        if not math.isclose(declared, value, rel_tol=1e-6):
            yield f"tolerance {name} is {declared:g}, but the rule for this target and delta gives {value:g}."


def _steps(privacy: dict[str, Any], curve_steps: int | None) -> Iterator[str]:
    run, planned = privacy["steps_run"], privacy["steps_planned"]
    if run > planned:
        yield f"steps_run is {run}, more than the {planned} planned."
    if curve_steps is not None and curve_steps != run:
        yield f"The curve holds {curve_steps} steps, but steps_run is {run}."


def _events(privacy: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[str]:
    """The ledger against what the record declares."""
    booked = events[-1]["step_to"] if events else 0
    if booked != privacy["steps_run"]:
        yield f"The ledger books {booked} steps, but steps_run is {privacy['steps_run']}."
    for event in events:
        where = f"Steps {event['step_from']} to {event['step_to']} of the ledger"
        for key in ("sampling_probability", "noise_multiplier"):
            if not math.isclose(event[key], privacy[key], rel_tol=REL):
                yield f"{where} have {key} {event[key]!r}, but the record declares {privacy[key]!r}."
        made, declared = len(event["releases"]), privacy["releases_per_step"]
        if made != declared:
            yield f"{where} make {made} releases each, but releases_per_step is {declared}."
        named = privacy.get("mechanism", "gaussian")
        if event["mechanism"] != named:
            yield f"{where} have mechanism {event['mechanism']!r}, but the record declares {named!r}."


def _epsilon(privacy: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[str]:
    """Epsilon recomputed from the ledger with both accountants, against the record."""
    delta, target, recorded = float(privacy["delta"]), float(privacy["target"]), privacy["epsilon"]
    eps_error = tolerance(target, delta)[0]
    try:
        values = epsilon(events, delta, target)
        found = cross_checks(Ledger.from_events(events), delta, target, opacus=False)
    except BadInput as problem:
        yield f"Epsilon cannot be recomputed from the ledger: {problem}"
        return
    for name, old, new in zip(("lower", "estimate", "upper"), recorded, values, strict=True):
        if abs(old - new) > eps_error:
            yield f"The {name} epsilon is recorded as {old:.6g}, but the ledger gives {new:.6g}."
    if not recorded[0] <= recorded[1] <= recorded[2]:
        yield f"The recorded epsilon {recorded!r} is not in the order lower, estimate, upper."
    upper = max(recorded[2], values[2])
    # a calibrated upper may sit right at the target, and another machine's last digits may differ
    if recorded[2] > target or values[2] > target * (1 + 1e-6):
        yield f"Upper epsilon {upper:.6g} exceeds the target {target:g}."
    if found["pld"] is None:
        yield "The second accountant (PLD) could not compute epsilon, so it is not cross-checked."
        return
    for which in (values, recorded):
        problem = disagreement(found, which, eps_error)
        if problem:
            yield problem
            break
    checks = privacy["cross_checks"]
    if ("fisher" in checks) != ("fisher" in found):
        yield f"The cross-checks are {sorted(checks)}, but for this ledger they are {sorted(found)}."
    for name in ("pld", "fisher"):
        old, new = checks.get(name), found.get(name)
        if old is not None and new is not None and not (_number(old) and abs(old - new) <= eps_error):
            yield f"The cross-check {name} is recorded as {old!r}, but the ledger gives {new:.6g}."
    opacus = checks["opacus_prv"]
    if opacus is not None and not values[0] - eps_error <= opacus <= values[2] + eps_error:
        yield f"The cross-check opacus_prv is recorded as {opacus:.6g}, outside [{values[0]:.6g}, {values[2]:.6g}]."
    reached = privacy["epsilon_at_threshold"]
    if reached is not None and not 0 <= reached <= upper + eps_error:
        yield f"epsilon_at_threshold {reached:.6g} is outside [0, {upper:.6g}]."


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 1e300

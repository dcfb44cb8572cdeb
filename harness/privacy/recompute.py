"""Recompute a record's privacy claims from its ledger alone, as a stranger would; needs no torch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy import pure, shape, tail, units
from dpft.harness.privacy.accountant import CLOSE, tolerance
from dpft.harness.privacy.certificate import cross_checks, disagreement
from dpft.harness.privacy.ledger import Ledger
from dpft.harness.privacy.samplings import SAMPLINGS, made
from dpft.harness.privacy.shape import is_number
from dpft.harness.privacy.spent import epsilon

REL = 1e-9
OURS = {"schema", "run_id", "status", "spec", "result", "cost", "diagnostics", "provenance", "error"}
REPEATS = 0.1  # how closely, in tolerances of the accountant, a recorded epsilon must be found again


def verify_record(
    record: dict[str, Any], curve_steps: int | None = None, curve_epsilon: Sequence[float] | None = None
) -> list[str]:
    """What is wrong with a record's `privacy` section, one sentence each; empty when all is right (or null).

    The ledger is the truth: epsilon is recomputed from it with prv-accountant and with PLD, and every declared quantity
    is compared with it, and with the record's `spec` and `result` where there are any. A record without a dpft `spec` is of
    another program: of it shape.CONTRACT is needed, and whatever else it declares under our names is checked too. curve_steps,
    curve_epsilon: the rows of the run's curve file and their epsilon, where there is one. Never raises for what a record holds.
    """
    if not isinstance(record, dict) or "privacy" not in record:
        return ["The record has no privacy section."]
    privacy = record["privacy"]
    if privacy is None:
        return list(_public(record))
    findings = list(shape.findings(privacy, is_foreign(record)))
    if findings:
        return findings
    findings = [*_declared(privacy), *_steps(privacy, curve_steps), *_asked(record, privacy)]
    try:
        events = Ledger.from_events(privacy["ledger"]).events
    except BadInput as problem:
        return [*findings, str(problem)]
    findings += [
        *_sampling(record, privacy, events),
        *_events(record, privacy, events),
        *_epsilon(privacy, events, is_foreign(record)),
    ]
    return [*findings, *_threshold(record, privacy, events, curve_epsilon)]


def is_foreign(record: Any) -> bool:
    """Whether another program made a record: it has not both `schema` and `spec`, and few other sections of ours.

    So a record of ours does not become another's by leaving its schema out.
    """
    return not isinstance(record, dict) or not ({"schema", "spec"} <= record.keys() or len(record.keys() & OURS) >= 4)


def _public(record: dict[str, Any]) -> Iterator[str]:
    """A record without a privacy section must be of a run that asked for no privacy, or never had a plan."""
    spec = record.get("spec")
    asked = spec.get("epsilon") if isinstance(spec, dict) else None
    if asked is not None and record.get("status") == "done":
        yield f"The run asked for epsilon {asked!r}, but the record has no privacy section."


def _declared(privacy: dict[str, Any]) -> Iterator[str]:
    """Declared quantities against each other."""
    adjacency = units.ADJACENCY[units.of(privacy)]
    if privacy.get("adjacency", adjacency) != adjacency:
        yield f"adjacency is {privacy['adjacency']!r}; only {adjacency!r} is certified."
    yield from units.declared(privacy)
    if privacy.get("sampling", "poisson") not in list(SAMPLINGS):
        yield f"sampling is {privacy['sampling']!r}; only {', '.join(SAMPLINGS)} are certified."
    batch, q = (privacy.get(key) for key in ("expected_batch_size", "sampling_probability"))
    (number, of), (people, who) = units.sampled(privacy)[::-1], units.protected(privacy)[::-1]
    if None not in (number, batch, q) and not math.isclose(q, batch / number, rel_tol=REL):
        yield f"sampling_probability {q!r} is not expected_batch_size / {of} = {batch!r} / {number}."
    if people is not None and privacy["delta"] >= 1 / people:
        yield f"delta {privacy['delta']:g} is not under 1 / {who} = {1 / people:g}, so it promises nothing."
    rule = dict(zip(("eps_error", "delta_error"), tolerance(privacy["target"], privacy["delta"]), strict=True))
    for name, value in rule.items() if "tolerance" in privacy else ():
        declared = privacy["tolerance"][name]
        if not math.isclose(declared, value, rel_tol=1e-6):
            yield f"tolerance {name} is {declared:g}, but the rule for this target and delta gives {value:g}."
    within = privacy.get("within_budget", True)
    if within is not True or privacy.get("error") is not None:
        yield f"The run says itself that it is not certified: within_budget {within!r}, error {privacy.get('error')!r}."


def _asked(record: dict[str, Any], privacy: dict[str, Any]) -> Iterator[str]:
    """What was spent against what the run's spec asked for."""
    if is_foreign(record):
        return
    spec = record["spec"] if isinstance(record.get("spec"), dict) else {}
    for key, asked in (("target", "epsilon"), ("expected_batch_size", "batch_size"), ("steps_planned", "steps")):
        wanted = spec.get(asked)
        if privacy[key] is not None and not (is_number(wanted) and math.isclose(privacy[key], wanted, rel_tol=REL)):
            yield f"{key} is {privacy[key]!r}, but the spec asks for {asked} {wanted!r}."
    wanted = spec.get("delta")
    who, people = units.protected(privacy)
    delta = 1 / (2 * people) if wanted is None else wanted
    if not (is_number(delta) and math.isclose(privacy["delta"], delta, rel_tol=REL)):
        rule = f"1 / (2 {who})" if wanted is None else "the spec"
        yield f"delta is {privacy['delta']!r}, but {rule} gives {delta!r}."
    yield from _noise(record, privacy, spec.get("mechanism", "gaussian"))
    yield from units.asked(privacy, spec)
    kind = units.sampling_of(*(spec.get(key, default) for key, default in units.SETTINGS.items()))
    if privacy["sampling"] != kind:
        yield f"sampling is {privacy['sampling']!r}, but the spec asks for {kind!r}."
    if privacy.get("noise_stream", 1) != spec.get("noise_stream", 1):
        yield f"noise_stream is {privacy.get('noise_stream', 1)!r}, but the spec asks for {spec.get('noise_stream', 1)!r}."
    if record.get("status") == "done" and privacy["steps_run"] != privacy["steps_planned"]:
        yield f"The run is done, but took {privacy['steps_run']} of its {privacy['steps_planned']} steps."


def _noise(record: dict[str, Any], privacy: dict[str, Any], mechanism: Any) -> Iterator[str]:
    """Which noise, from where, and not more of it than calibration gives: more would be matched with nothing."""
    provenance = record.get("provenance")
    settings = provenance.get("settings") if isinstance(provenance, dict) else None
    if isinstance(settings, dict) and "secure_noise" in settings:  # older records do not say
        if "mechanism" not in privacy:
            yield "The privacy section lacks mechanism."
        seed = "os" if settings["secure_noise"] is True else "seed of the run"
        if privacy.get("noise_seed") != seed:
            yield f"noise_seed is {privacy.get('noise_seed')!r}, but the run's settings give {seed!r}."
    elif privacy.get("noise_seed", "seed of the run") != "seed of the run":
        yield f"noise_seed is {privacy['noise_seed']!r}, but the run's settings do not say that its noise was secure."
    if privacy.get("mechanism", mechanism) != mechanism:
        yield f"mechanism is {privacy['mechanism']!r}, but the spec asks for {mechanism!r}."
    target, upper = privacy["target"], privacy["epsilon"][2]
    if privacy["steps_run"] == privacy["steps_planned"] and upper < target * (1 - CLOSE - 1e-6):
        yield (
            f"Upper epsilon {upper:.6g} is more than {CLOSE:.1%} under the target {target:g}, so the noise is not what "
            "calibration gives."
        )


def _steps(privacy: dict[str, Any], curve_steps: int | None) -> Iterator[str]:
    run, planned, lost = privacy.get("steps_run"), privacy.get("steps_planned"), privacy.get("steps_lost", 0)
    if None not in (run, planned) and run > planned:
        yield f"steps_run is {run}, more than the {planned} planned."
    if None not in (run, curve_steps) and curve_steps != run - lost:
        yield f"The curve holds {curve_steps} steps, but steps_run is {run}" + (
            f", {lost} of them lost." if lost else "."
        )
    if lost and privacy.get("noise_seed") != "os":
        yield f"steps_lost is {lost}, but only a run with noise of the system's entropy loses releases."


def _events(record: dict[str, Any], privacy: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[str]:
    """The ledger against what the record declares."""
    foreign, spec = is_foreign(record), record.get("spec")
    asked = None if foreign or not isinstance(spec, dict) else spec.get("mechanism", "gaussian")
    booked, run = events[-1]["step_to"] if events else 0, privacy.get("steps_run")
    if run is not None and booked != run:
        yield f"The ledger books {booked} steps, but steps_run is {run}."
    probability = privacy.get("sampling_probability")
    declared_of = {
        **privacy,
        "sampling_probability": probability and Ledger.from_events(events).sampling.probability(probability),
    }
    kinds = {key: {event[key] for event in events} for key in ("sampling_probability", "noise_multiplier")}
    kinds |= {
        "expected_batch_size": kinds["sampling_probability"],
        "releases_per_step": {len(e["releases"]) for e in events},
    }
    for key, values in kinds.items():
        if key in privacy and privacy[key] is None and len(values) < 2:
            yield f"{key} is null, which it may be only where the ledger has several."
    for event in events:
        where = f"Steps {event['step_from']} to {event['step_to']} of the ledger"
        for key in ("sampling_probability", "noise_multiplier"):
            declared = declared_of.get(key)
            if declared is not None and not math.isclose(event[key], declared, rel_tol=REL):
                yield f"{where} have {key} {event[key]!r}, but the record declares {declared!r}."
        made, declared = len(event["releases"]), privacy.get("releases_per_step")
        if declared is not None and made != declared:
            yield f"{where} make {made} releases each, but releases_per_step is {declared}."
        named = privacy.get("mechanism", asked)
        if named is not None and event["mechanism"] != named:
            yield f"{where} have mechanism {event['mechanism']!r}, but the record declares {named!r}."
        ratios, names = ([release[key] for release in event["releases"]] for key in ("sensitivity_ratio", "name"))
        if not foreign and any(ratio != 1 for ratio in ratios):
            yield f"{where} must have releases of sensitivity_ratio 1, not {ratios!r}."
        if not foreign and len(set(names)) < len(names):
            yield f"{where} release the same name twice: {', '.join(names)}."


def _sampling(record: dict[str, Any], privacy: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[str]:
    """How the ledger says that batches were drawn, against what is declared and asked for."""
    found = Ledger.from_events(events).sampling
    declared = privacy.get("sampling", "poisson")
    if events and "sampling" in privacy and found.kind != declared:
        yield f"sampling is {declared!r}, but the ledger's batches are {found.kind}."
        return
    spec = record.get("spec")
    if is_foreign(record) or not isinstance(spec, dict) or not events:
        return
    settings = [spec.get(key) for key in ("batch_size", "truncated_batch_size")]
    try:
        asked = made(declared, units.sampled(privacy)[1], *settings, spec.get("bands", 1), spec.get("group_size"))
    except (BadInput, TypeError, ValueError) as problem:
        yield f"The spec's batches cannot be drawn: {problem}"
        return
    if asked != found:
        yield f"The ledger's sampling is {found.to_dict()!r}, but the spec's settings give {asked.to_dict()!r}."


def _threshold(
    record: dict[str, Any], privacy: dict[str, Any], events: list[dict[str, Any]], curve: Sequence[float] | None
) -> Iterator[str]:
    """Epsilon at the threshold against the steps that led there, and the curve's epsilon against the certificate."""
    reached, result = privacy.get("epsilon_at_threshold"), record.get("result")
    steps = result.get("steps_to_threshold") if isinstance(result, dict) else None
    if isinstance(result, dict) and (reached is None) != (steps is None):
        yield f"epsilon_at_threshold is {reached!r}, but steps_to_threshold is {steps!r}."
        return
    if steps is not None and (type(steps) is not int or not 1 <= steps <= (events[-1]["step_to"] if events else 0)):
        yield f"steps_to_threshold is {steps!r}, which is no step of the run."
        return
    eps_error = tolerance(privacy["target"], privacy["delta"])[0]
    least = {} if steps is None else {steps: _after(steps, privacy, events)}
    if None not in (reached, least.get(steps)) and reached < least[steps] - eps_error:
        yield f"epsilon_at_threshold is {reached:.6g}, but the first {steps} steps spend {least[steps]:.6g}."
    if not curve:
        return
    if not all(map(is_number, curve)) or list(curve) != sorted(curve):
        yield "The epsilon of the curve's rows is not there everywhere, or falls."
        return
    if abs(curve[-1] - privacy["epsilon"][2]) > eps_error and len(curve) == privacy.get("steps_planned"):
        yield f"The curve ends at epsilon {curve[-1]:.6g}, the record at {privacy['epsilon'][2]:.6g}."
    elif None not in (reached, steps) and not math.isclose(reached, curve[min(steps, len(curve)) - 1], abs_tol=1e-6):
        yield f"epsilon_at_threshold is {reached:.6g}, but the curve has another epsilon after {steps} steps."
    for step in {1, (len(curve) + 1) // 2} - least.keys():
        least[step] = _after(step, privacy, events)
    for step, spent in least.items():
        if spent is not None and step <= len(curve) and curve[step - 1] < spent - eps_error:
            yield f"The curve has epsilon {curve[step - 1]:.6g} after {step} steps, which spend {spent:.6g}."


def _after(steps: int, privacy: dict[str, Any], events: list[dict[str, Any]]) -> float | None:
    """Upper epsilon of the ledger's first `steps` steps; None where there is none, which is said of the whole ledger."""
    taken = [{**e, "step_to": min(e["step_to"], steps)} for e in events if e["step_from"] < steps]
    try:
        return epsilon(taken, privacy["delta"], privacy["target"])[2]
    except BadInput:
        return None


def _epsilon(privacy: dict[str, Any], events: list[dict[str, Any]], foreign: bool) -> Iterator[str]:
    """Epsilon recomputed from the ledger with both accountants, against the record."""
    delta, target, recorded = float(privacy["delta"]), float(privacy["target"]), privacy["epsilon"]
    eps_error = tolerance(target, delta)[0]
    stream = privacy.get("noise_stream", 1)
    if delta == 0 and stream == 1 and not foreign:
        yield f"delta is 0, but {pure.ENDS}"
    short = tail.missing(events, delta, stream)
    if stream != 1 and not math.isclose(privacy.get("tail_delta", -1.0), short, rel_tol=1e-6):
        yield f"tail_delta is {privacy.get('tail_delta')!r}, but noise of stream {stream} lacks {short:.6g}."
    try:
        values = epsilon(events, delta - short, target)
        found = cross_checks(Ledger.from_events(events), delta - short, target, opacus=False)
    except BadInput as problem:
        yield f"Epsilon cannot be recomputed from the ledger: {problem}"
        return
    for name, old, new in zip(("lower", "estimate", "upper"), recorded, values, strict=True):
        if abs(old - new) > REPEATS * eps_error:
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
    checks = privacy.get("cross_checks", {"pld": None, "opacus_prv": None})
    if "cross_checks" in privacy and ("fisher" in checks) != ("fisher" in found):
        yield f"The cross-checks are {sorted(checks)}, but for this ledger they are {sorted(found)}."
    for name in ("pld", "fisher"):
        old, new = checks.get(name), found.get(name)
        if old is None and (foreign or name not in checks or new is None):
            continue
        if new is None or not is_number(old) or abs(old - new) > REPEATS * eps_error:
            yield f"The cross-check {name} is recorded as {old!r}, but the ledger gives {new!r}."
    opacus = checks["opacus_prv"]
    if opacus is not None and not values[0] - eps_error <= opacus <= values[2] + eps_error:
        yield f"The cross-check opacus_prv is recorded as {opacus:.6g}, outside [{values[0]:.6g}, {values[2]:.6g}]."
    reached = privacy.get("epsilon_at_threshold")
    if reached is not None and not 0 <= reached <= upper + eps_error:
        yield f"epsilon_at_threshold {reached:.6g} is outside [0, {upper:.6g}]."

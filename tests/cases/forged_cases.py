"""Committed records and what an author could change in them, keeping as much as possible in agreement with itself."""

import copy
import json

import polars
from studies import loose

from dpft.harness.privacy import certify, epsilon_curve
from dpft.harness.runs.spec import RunSpec, completed

SST2 = "official/202fa8da841b6f51"  # dp-lora, evaluated on all of the validation split
SENTENCES, OTHER = (
    "full/260fb9071b5fa7ba",
    "full/16b43171a454e1f3",
)  # dp-adam, dp-grape; evaluated on an eighth, no chain
PUBLIC = "official/500ea459772969e9"  # non-private


def newer():
    """A record that says where its noise is from."""
    return next(
        f"full/{path.stem}"
        for path in sorted(loose("full").glob("*.json"))
        if "noise_seed" in json.loads(path.read_text())["privacy"]
    )


def load(name):
    """(record, rows of its curve)."""
    study, run_id = name.split("/")
    path = loose(study) / f"{run_id}.json"
    return json.loads(path.read_text()), polars.read_parquet(path.with_suffix(".parquet")).rows(named=True)


def put(folder, record, rows):
    """Write both as a run of `folder`, under the record's own id."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{record['run_id']}.json"
    path.write_text(json.dumps(record))
    if rows is not None:
        polars.DataFrame(rows, infer_schema_length=None).write_parquet(path.with_suffix(".parquet"))


def set_at(path, value):
    """A forgery that sets one entry; `path`: keys with dots."""

    def forge(record, rows):
        *way, last = path.split(".")
        for key in way:
            record = record[key]
        record[last] = value

    return forge


def drop(path):
    """A forgery that takes one entry out."""

    def forge(record, rows):
        *way, last = path.split(".")
        for key in way:
            record = record[key]
        del record[last]

    return forge


def column(name, change):
    """A forgery of one column of the curve: `change` of each row's value and index."""

    def forge(record, rows):
        for index, row in enumerate(rows):
            row[name] = change(row[name], index)

    return forge


def without(name):
    def forge(record, rows):
        for row in rows:
            del row[name]

    return forge


def both(*forgeries):
    def forge(record, rows):
        for one in forgeries:
            one(record, rows)

    return forge


def renamed(record, rows):
    """The id recomputed, so that it is that of the forged spec."""
    record["run_id"] = RunSpec(**completed(record["spec"])).run_id


def recertified(record, rows):
    """Everything in the privacy section that follows from N, B, T and sigma made to agree, and the curve's epsilon."""
    privacy, spec = record["privacy"], record["spec"]
    n, sigma, steps = privacy["num_examples"], privacy["noise_multiplier"], spec["steps"]
    delta, q = 1 / (2 * n), spec["batch_size"] / n
    (event,) = privacy["ledger"]
    event |= {"sampling_probability": q, "noise_multiplier": sigma, "step_to": steps}
    event["releases"][0]["noise_multiplier"] = sigma
    privacy |= {"delta": delta, "sampling_probability": q, "steps_planned": steps, "steps_run": steps}
    privacy |= certify([event], delta, spec["epsilon"])
    spent = epsilon_curve(sigma, q, steps, delta, spec["epsilon"])
    del rows[steps:]
    for row in rows:
        row["epsilon"] = spent[row["step"]]
    if privacy["epsilon_at_threshold"] is not None:
        privacy["epsilon_at_threshold"] = spent[record["result"]["steps_to_threshold"]]
    record["cost"]["example_gradients"] = spec["batch_size"] * steps


def more_examples(record, rows):
    record["privacy"]["num_examples"] *= 10
    recertified(record, rows)


def more_noise(record, rows):
    record["privacy"]["noise_multiplier"] *= 1.08
    recertified(record, rows)


def fewer_steps(record, rows):
    record["spec"]["steps"] -= record["spec"]["eval_every"]
    recertified(record, rows)
    renamed(record, rows)


def not_private(record, rows):
    record["privacy"] = None
    record["spec"] |= {"epsilon": None, "clip_norm": None}
    renamed(record, rows)
    for row in rows:
        row |= dict.fromkeys(("epsilon", "clipped_fraction", "alignment_noisy", "alignment_decoded", "snr"))


def another_curve(record, rows):
    rows[:] = load(OTHER)[1]


def raised(value):
    return both(set_at("result.final", value), set_at("result.all_metrics", {"accuracy": value}))


FORGED = {
    "raised final": (SST2, raised(0.9)),
    "raised final of a sample": (SENTENCES, raised(0.95)),
    "final of no number of examples": (SENTENCES, raised(0.79951)),
    "final alone": (SENTENCES, set_at("result.final", 0.95)),
    "NaN final": (SST2, raised(float("nan"))),
    "no final": (SST2, raised(None)),
    "another method's curve": (SENTENCES, another_curve),
    "best step": (SENTENCES, set_at("result.best_step", 2)),
    "steps to threshold": (SST2, set_at("result.steps_to_threshold", 20)),
    "negative steps to threshold": (SST2, set_at("result.steps_to_threshold", -1000)),
    "threshold": (SST2, set_at("result.threshold", 0.5)),
    "censored": (SST2, set_at("result.censored", True)),
    "chance": (SST2, set_at("result.chance", 0.4)),
    "metric": (SST2, both(set_at("result.metric", "f1"), set_at("result.all_metrics", {"f1": 0.8061926605504587}))),
    "clip norm": (SENTENCES, both(set_at("spec.clip_norm", 1e6), renamed)),
    "no clip norm": (SENTENCES, both(set_at("spec.clip_norm", None), renamed)),
    "clip norm without its id": (SST2, set_at("spec.clip_norm", 1e6)),
    "mechanism of the spec": (SENTENCES, both(set_at("spec.mechanism", "laplace"), renamed)),
    "mechanism": (newer(), set_at("privacy.mechanism", "laplace")),
    "ten times N": (SST2, more_examples),
    "ten times N, no epsilon in the curve": (SST2, both(more_examples, without("epsilon"))),
    "more noise": (SST2, more_noise),
    "more noise, no epsilon in the curve": (SST2, both(more_noise, without("epsilon"))),
    "steps removed": (SST2, fewer_steps),
    "steps removed of a constant rate": (SENTENCES, fewer_steps),
    "noise from elsewhere": (newer(), set_at("privacy.noise_seed", "os")),
    "noise from elsewhere, older": (SST2, set_at("privacy.noise_seed", "os")),
    "noise from nowhere": (newer(), drop("privacy.noise_seed")),
    "private diagnostics": (SST2, set_at("diagnostics.private", True)),
    "no within_budget": (SST2, drop("privacy.within_budget")),
    "no error": (SST2, drop("privacy.error")),
    "data fingerprint": (SST2, set_at("provenance.data_fingerprint", "0" * 64)),
    "model fingerprint": (SST2, set_at("provenance.model_fingerprint", "0" * 64)),
    "no fingerprint": (SST2, set_at("provenance.data_fingerprint", None)),
    "no epsilon, no privacy": (SENTENCES, not_private),
    "no privacy": (SST2, set_at("privacy", None)),
    "no schema": (SST2, drop("schema")),
    "no schema and more": (SST2, both(drop("schema"), set_at("result.final", 2.0))),
    "no spec": (SST2, set_at("spec", None)),
    "an unknown option": (SENTENCES, both(set_at("spec.options", {"rank": 99}), renamed)),
    "a batch of text": (SENTENCES, both(set_at("spec.lr", "0.1"), renamed)),
    "learning rates": (SST2, column("lr", lambda value, index: value * 2)),
    "steps of the curve": (SST2, column("step", lambda value, index: value + 1)),
    "a metric too few": (SST2, column("metric", lambda value, index: None if index == 9 else value)),
    "a metric too many": (SST2, column("metric", lambda value, index: 0.8 if index == 8 else value)),
    "metrics": (SST2, column("metric", lambda value, index: None if value is None else min(1.0, value + 0.1))),
    "clipped shares": (SST2, column("clipped_fraction", lambda value, index: 2 * value)),
    "alignments": (SST2, column("alignment_noisy", lambda value, index: None if value is None else 0.9)),
    "epsilon of the curve": (SST2, column("epsilon", lambda value, index: value / 2 if index < 20 else value)),
    "epsilon of one row": (SST2, column("epsilon", lambda value, index: value + 0.005 if index == 20 else value)),
    "a curve without losses": (SST2, column("loss", lambda value, index: None)),
    "a column too few": (SST2, without("clipped_fraction")),
    "no rows": (SST2, lambda record, rows: rows.clear()),
    "gradients": (SST2, set_at("cost.example_gradients", 1000)),
    "more trainable than there are": (SST2, set_at("cost.trainable_parameters", 10**9)),
    "no cost": (SST2, set_at("cost", None)),
    "no versions": (SST2, set_at("provenance.versions", {})),
    "an error": (SST2, set_at("error", "none really")),
    "method version": (PUBLIC, both(set_at("spec.method_version", 0.5), renamed)),
    "private after all": (PUBLIC, both(set_at("spec.epsilon", 8.0), renamed)),
    "final of a non-private run": (PUBLIC, raised(0.99)),
}


def forged(name):
    """(record, rows) of a forgery."""
    base, forge = FORGED[name]
    record, rows = copy.deepcopy(load(base))
    forge(record, rows)
    return record, rows

"""Real records of results/, changed as a test needs them, in a folder with their curves."""

import copy
import json
import re
from pathlib import Path

import polars
from studies import loose

from dpft.harness import report
from dpft.harness.records.store import Store
from dpft.harness.runs.spec import RunSpec, completed

ROOT = Path(__file__).parents[2]


def records(folder="full", **spec):
    """Fresh records of a folder of results/ whose spec has these values, without their long diagnostics."""
    found = []
    for path in sorted(loose(folder).glob("*.json")):
        record = json.loads(path.read_text())
        if all(record["spec"][key] == value for key, value in spec.items()):
            record["diagnostics"] = {
                key: record["diagnostics"][key] for key in ("private", "alignment", "clipped_fraction")
            }
            record["source"] = path.with_suffix(".parquet")
            found.append(record)
    return found


def changed(record, final=None, **spec):
    """A copy with another spec, the run id of it, and perhaps another final value; its curve stays the same."""
    new = copy.deepcopy(record)
    new["spec"] |= spec
    new["run_id"] = RunSpec(**completed(new["spec"])).run_id
    if final is not None:
        new["result"] |= {"final": final, "all_metrics": {new["result"]["metric"]: final}}
    return new


def failed(record, status="diverged"):
    """The same run, ended without a result."""
    return {**copy.deepcopy(record), "status": status, "result": None, "error": "The loss was not finite."}


def shorter(record, steps):
    """The same run planned, made and certified for fewer steps, with the noise that these need."""
    from dpft.harness.privacy import certify
    from dpft.harness.runs.plan import plan

    new = changed(record, steps=steps)
    privacy = new["privacy"]
    made = plan(RunSpec(**completed(new["spec"])), None, num_examples=privacy["num_examples"])
    (event,) = privacy["ledger"]
    (release,) = event["releases"]
    noise = {"noise_multiplier": made.noise_multiplier}
    privacy["ledger"] = [{**event, "step_to": steps, **noise, "releases": [{**release, **noise}]}]
    privacy |= {"noise_multiplier": made.noise_multiplier, "steps_planned": steps, "steps_run": steps}
    privacy |= certify(privacy["ledger"], privacy["delta"], privacy["target"])
    reached = new["result"]["steps_to_threshold"]
    if reached is not None and reached > steps:
        new["result"] |= {"steps_to_threshold": None, "censored": True}
        reached = None
    privacy["epsilon_at_threshold"] = None if reached is None else made.epsilon_curve[reached]
    curve = polars.read_parquet(new["source"])[:steps]
    new["curve"] = curve.with_columns(polars.Series("epsilon", made.epsilon_curve[1 : steps + 1]))
    return new


def store_of(folder, chosen):
    """A store that holds these records and their curves."""
    store = Store(folder)
    store.open_for_writing()
    for record in chosen:
        source, curve = record["source"], record.get("curve")
        kept = {key: value for key, value in record.items() if key not in ("source", "curve")}
        store.record_path(record["run_id"]).write_text(json.dumps(kept))
        if record["status"] == "done" and curve is not None:
            curve.write_parquet(store.curve_path(record["run_id"]))
        elif record["status"] == "done":
            store.curve_path(record["run_id"]).symlink_to(source)
    return store


def text_of(folder, chosen, **options):
    """The report of these records as `dpft report` prints it."""
    store = store_of(folder, chosen)
    return report.markdown(report.summaries(store), store, options=report.Options(**options))


def lines(text, table=0):
    """The lines of the table at that place: column -> text without its spaces."""
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in blocks[table].splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def ranks(text, table=0):
    """Method -> its rank, an empty text where it has none."""
    return {line["method"]: line["#"] for line in lines(text, table)}

"""A folder of many finished runs that `dpft verify` finds fine, with the suite that asks for them, made from committed ones.

`python tests/cases/large_store.py FOLDER COUNT` writes FOLDER/runs and FOLDER/suite.toml: runs of the demo at other learning
rates and seeds, whose chains are made anew. What plan, run, report, page and verify take of it: docs/records.md.
"""

import json
import sys
from pathlib import Path

import polars
import pyarrow
import pyarrow.parquet
from studies import loose

from dpft.harness.records import chain, looks
from dpft.harness.runs.spec import RunSpec, completed

METHODS, RATES = ("dp-adam", "dp-lora", "last-layer", "noise-only"), 5
LEFT_OUT = ("task_version", "method_version", "decoder_version", "noise_stream", "options", "task_options")


def make(folder, count):
    """`count` runs, a multiple of 20 (methods x learning rates), in `folder`/runs; gives the path of the suite."""
    runs = Path(folder) / "runs"
    runs.mkdir(parents=True)
    originals = [json.loads(path.read_text()) for path in sorted(loose("official").glob("*.json"))]
    demo = {one["spec"]["method"]: one for one in originals if one["spec"]["task"] == "sentences"}
    seeds, suite = count // (len(METHODS) * RATES), []
    for method in METHODS:
        record, seen = looks.apart(demo[method])
        rows = polars.read_parquet(loose("official") / f"{record['run_id']}.parquet").rows(named=True)
        beside = looks.column(seen, [row["step"] for row in rows])
        rates = [record["spec"]["lr"] * 2**i for i in range(RATES)]
        for lr in rates:
            for seed in range(seeds):
                new, curve = _clone(record, rows, lr, seed)
                (runs / f"{new['run_id']}.json").write_text(json.dumps(new, indent=1))
                table = pyarrow.Table.from_pylist(curve)
                table = table if beside is None else table.append_column(looks.COLUMN, [beside])
                pyarrow.parquet.write_table(table, runs / f"{new['run_id']}.parquet", write_statistics=False)
        spec = {k: v for k, v in record["spec"].items() if v is not None and k not in LEFT_OUT}
        given = {**spec, **record["spec"]["options"], "lr": rates, "seed": list(range(seeds))}
        suite += ["[[large.arms]]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
    path = Path(folder) / "suite.toml"
    path.write_text("\n".join(suite) + "\n")
    return path


def _clone(record, rows, lr, seed):
    """The run at another rate and seed: another id, losses that are its own, a chain that ties them."""
    new = {**record, "spec": {**record["spec"], "lr": lr, "seed": seed}}
    spec = RunSpec(**completed(new["spec"]))
    new["run_id"] = spec.run_id
    shift = 1 + 1e-6 * int(spec.run_id, 16) / 16**16  # no two of many runs alike
    rows = [
        {**row, "lr": lr * spec.lr_factor(at), "loss": None if row["loss"] is None else row["loss"] * shift}
        for at, row in enumerate(rows)
    ]
    *_, value = chain.values(new, rows)
    new["chain"] = {"version": chain.VERSION, "value": value}
    return new, rows


if __name__ == "__main__":
    print(make(sys.argv[1], int(sys.argv[2])))

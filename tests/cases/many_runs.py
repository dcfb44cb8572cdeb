"""Many records from a few real ones: other seeds, methods and learning rates. `python tests/many_runs.py SOURCE FOLDER COUNT`."""

import json
import random
import shutil
import sys
from pathlib import Path

from dpft.harness.records.schema import SECTIONS
from dpft.harness.runs.spec import RunSpec, completed

METHODS = (
    "dp-adam",
    "dp-lora",
    "dp-grape",
    "dp-bitfit",
    "last-layer",
    "rmt",
    "rmt-paper",
    "dp-muon",
    "ffa-lora",
    "dp-sgd",
)
RATES, SEEDS = (1e-4, 2e-4, 4e-4, 8e-4, 16e-4), 10


def make(source: Path, folder: Path, count: int) -> None:
    """`count` records in `folder`, clones of the finished private ones of `source`: tasks x methods x lr x seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = [json.loads(path.read_text()) for path in sorted(source.glob("*.json"))]
    originals = [record for record in originals if record["status"] == "done" and record["privacy"]]
    bulk = [json.dumps(record.pop("diagnostics"), indent=1).replace("\n", "\n ") for record in originals]
    rng = random.Random(0)
    for i in range(count):
        rest, seed = divmod(i, SEEDS)
        rest, lr = divmod(rest, len(RATES))
        task, method = divmod(rest, len(METHODS))
        decoder = "rmt" if "rmt" in METHODS[method] else "mean"
        alike = [n for n, one in enumerate(originals) if one["spec"]["decoder"] == decoder] or [0]
        chosen = alike[method % len(alike)]
        original = originals[chosen]
        spec = {**original["spec"], "task": f"task-{task}", "method": METHODS[method], "lr": RATES[lr], "seed": seed}
        final = original["result"]["final"] + 0.01 * method + rng.gauss(0, 0.01)
        run_id = RunSpec(**completed(spec)).run_id
        result = {**original["result"], "final": final, "all_metrics": {original["result"]["metric"]: final}}
        record = {**original, "run_id": run_id, "spec": spec, "result": result}
        record = {key: record.get(key, "@") for key in SECTIONS}
        text = json.dumps(record, indent=1).replace('"@"', bulk[chosen], 1)
        (folder / f"{run_id}.json").write_text(text)
        shutil.copyfile(source / f"{original['run_id']}.parquet", folder / f"{run_id}.parquet")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

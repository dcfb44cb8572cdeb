"""Folders of many records for the tests of the page: real records of results/, cloned over seeds, rates, tasks and failures."""

import gzip
import json
import re
from base64 import b64decode
from pathlib import Path

import report_cases
from studies import loose

from dpft.harness.records.store import Store
from dpft.harness.report import page
from dpft.harness.runs.spec import RunSpec, completed

ROOT = Path(__file__).parents[2]
HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="document.title=1"><!--'


def originals():
    """(record, curve file) of the repository's records, without their long diagnostics."""
    found = []
    for folder in ("official", "full", "theory"):
        for record in Store(loose(folder)).records():
            record["diagnostics"] = {
                k: v for k, v in record["diagnostics"].items() if k in ("private", "alignment", "clipped_fraction")
            }
            found.append((record, loose(folder) / f"{record['run_id']}.parquet"))
    return found


def clones(folder, count):
    """A store of `count` runs: every original with new seeds, learning rates and task names; every 50th has failed."""
    store, sources = Store(folder), originals()
    store.open_for_writing()
    for i in range(count):
        record, curve = sources[i % len(sources)]
        generation = i // len(sources)
        seed = record["spec"]["seed"] + 3 * (generation % 5)  # the originals have seeds 0 to 2
        spec = {**record["spec"], "seed": seed, "task": f"{record['spec']['task']}-{generation // 5 % 20}"}
        spec["lr"] = record["spec"]["lr"] * (1 + 0.07 * (generation // 100))
        clone = {**record, "run_id": RunSpec(**completed(spec)).run_id, "spec": spec}
        if record["result"] is not None:
            final = record["result"]["final"] + (i * 7919 % 1000 - 500) / 2e4
            metrics = {record["result"]["metric"]: final}
            clone["result"] = {**record["result"], "final": final, "all_metrics": metrics}
        if i % 50 == 49:
            clone |= {
                "status": ("oom", "skipped", "error")[i // 50 % 3],
                "result": None,
                "error": f"Reason {i}. {HOSTILE}",
            }
        store.record_path(clone["run_id"]).write_text(json.dumps(clone))
        store.curve_path(clone["run_id"]).symlink_to(curve)
    return store


def unpacked(path, name):
    """What the page at `path` embeds as `name`: index, block-0, ..."""
    text = re.search(rf'id="{name}">([^<]*)<', path.read_text())[1]
    return json.loads(gzip.decompress(b64decode(text)))


def index_of(folder, chosen):
    """The index of the page of these records."""
    store = report_cases.store_of(folder / "runs", chosen)
    page.write(folder / "page.html", store, store.each())
    return unpacked(folder / "page.html", "index")

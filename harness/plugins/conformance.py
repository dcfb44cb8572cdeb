"""Does a plug-in keep the contract while it runs? For its own tests: `assert of_method(FILE, "mine", tmp_path) == []`.

Classes have been looked at when the file is loaded (contract.py). Here a method is audited, which compares what each example adds
with what torch.func finds of it alone, and a small run is made twice and verified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpft.harness.audit.audit import audit
from dpft.harness.audit.subject import Question
from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store
from dpft.harness.records.verifying import verify_folder
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.settings import Settings

AUDITED = 20  # steps
SIZE = {"steps": 4, "eval_every": 2, "epsilon": 1.0}
EXPECTED = 64  # the batch of a small run, of a smaller task a quarter of it


def of_method(file: Path, name: str, folder: Path, **settings: Any) -> list[str]:
    """What is wrong with a method, a sentence each. settings: of the small run (task=, model=, options).

    folder: an empty one, for its records. Raises BadInput as `registry.load_plugin`.
    """
    registry.load_plugin(file)
    settings = {"task": "low-rank", "model": "layers", **settings}
    options = {key: value for key, value in settings.items() if key in registry.method(name).options}
    problems = []
    if registry.method(name).private:
        try:
            found = audit(Question(name, steps=AUDITED, changes=options))
            problems += [f"The audit says: {violation}." for violation in found.violations]
        except BadInput as problem:
            problems.append(str(problem))
    return problems + _runs(folder, {"method": name, **settings}, None)


def of_task(file: Path, name: str, folder: Path, data_dir: Path | None = None, **settings: Any) -> list[str]:
    """What is wrong with a task, a sentence each. settings: of the small run (method=, model=, options), dp-sgd by default.

    folder: an empty one, for its records. Raises BadInput as `registry.load_plugin`.
    """
    registry.load_plugin(file)
    options = {key: value for key, value in settings.items() if key in registry.task(name).options}
    problems, task = [], registry.task(name)(options)
    try:
        data, again = (task.load(data_dir) for _ in range(2))
        if data.fingerprint != again.fingerprint:
            problems.append(f"Task {name} loads other rows the second time; let `load` depend on its settings alone.")
        if task.fingerprint(data_dir) not in (None, data.fingerprint):
            problems.append(f"`fingerprint` of task {name} is not that of the rows that `load` gives; correct it.")
        if task.train_size(data_dir) != len(data.train):
            problems.append(
                f"`train_size` of task {name} is not the {len(data.train)} rows that `load` gives; correct it."
            )
    except BadInput as problem:
        problems.append(str(problem))
    return problems or _runs(folder, {"method": "dp-sgd", "task": name, **settings}, data_dir)


def _runs(folder: Path, settings: dict[str, Any], data_dir: Path | None) -> list[str]:
    """What is wrong with the small run: it fails, its record does not verify, or a second one differs."""
    size = registry.task(settings["task"])().train_size(data_dir)
    spec = resolve({**SIZE, "batch_size": max(1, min(EXPECTED, size // 4)), **settings})
    store, curves = Store(folder), []
    store.open_for_writing()
    for _ in range(2):
        record, curve = run.execute(spec, Settings(data_dir), lambda step, row: None)
        if record["status"] != "done":
            return [f"A small run ended with status {record['status']}: {record['error']}"]
        curves.append(curve)
    store.write(record, curve)
    problems = verify_folder(folder)[spec.run_id].findings
    if curves[0] != curves[1]:
        step = next(row["step"] for row, other in zip(*curves, strict=True) if row != other)
        problems.append(
            f"Two runs of one seed differ from step {step} on; draw from the generator that `prepare` gets."
        )
    return problems

"""What `dpft plan` shows: every run, what it will spend, and what it should cost by runs already made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import selection
from dpft.harness.privacy.noise_kinds import covering_gaussian
from dpft.harness.privacy.samplings import POISSON
from dpft.harness.privacy.shares import described
from dpft.harness.records.store import Store
from dpft.harness.runs.expected import Expected
from dpft.harness.runs.plan import PrivacyPlan, plan
from dpft.harness.runs.releases import GRADIENT
from dpft.harness.runs.sources import Sources, differences
from dpft.harness.runs.spec import RunSpec
from dpft.tasks.hub import Fetch

SHOWN = 5  # ids of runs in a line


def there(store: Store) -> list[dict[str, Any]]:
    """The records of the folder without their bulk, none where it is yet to be made."""
    return list(store.sound(store.summary)) if store.folder.is_dir() else []


def overview(
    runs: list[RunSpec],
    store: Store,
    records: Sequence[dict[str, Any]],
    data_dir: Path | None,
    tries: float | None = None,
) -> list[dict[str, Any]]:
    """One row per run; tries: also what the best of about so many such runs costs (harness/privacy/selection.py).

    records: what is `there`. `releases`: the shares of the budget, by name, of every stretch of equal steps.
    """
    by_id = {r["run_id"]: r for r in records}
    sources, budgets = Sources(data_dir), {}
    rows = []
    for spec in runs:
        record = by_id.get(spec.run_id)
        row = {
            "run": spec.run_id,
            "task": spec.task,
            "model": spec.model,
            "method": spec.method,
            "seed": spec.seed,
            "state": _state(record, spec, sources) if record is not None else _absent(store, spec),
        }
        alike = spec.setting()  # neither has a part in what is spent
        if alike not in budgets:
            budgets[alike] = _budget(spec, sources, tries)
        rows.append(row | budgets[alike])
    return rows


def estimated(
    rows: Sequence[dict[str, Any]], runs: Sequence[RunSpec], records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows with time and memory (runs/expected.py). Of what is stopped no memory is predicted, which takes seconds."""
    expected = Expected(records)
    return [row | expected.of(spec, row["problem"] is None) for row, spec in zip(rows, runs, strict=True)]


def _absent(store: Store, spec: RunSpec) -> str:
    return "damaged record" if store.record_path(spec.run_id).exists() else "missing"  # that was passed over


def _state(record: dict[str, Any], spec: RunSpec, sources: Sources) -> str:
    """The status, or that the run was made of something else; data on the hub are not fetched for it."""
    try:
        found = differences(record, spec, sources) if sources.local(spec) else []
    except CannotRun:
        return f"{record['status']}, data or model not here"
    return f"{record['status']}, {found[0][0]} changed" if found else record["status"]


def _budget(spec: RunSpec, sources: Sources, tries: float | None) -> dict[str, Any]:
    row = {
        "epsilon": None,
        "delta": None,
        "sigma": None,
        "q": None,
        "T": spec.steps,
        "sampling": None,
        "releases": None,
    }
    row["problem"] = None
    try:
        size = sources.train_size(spec)
        found = plan(spec, sources.data_dir, lambda: _dimension(spec, sources.data_dir), size)
    except BadInput as error:
        return row | {"problem": str(error)}
    curve = found.epsilon_curve
    if tries is not None and found.noise is not None:
        row |= _choice(spec, found, tries)
    return row | {
        "epsilon": curve[-1] if curve else None,
        "delta": found.delta,
        "sigma": found.noise_multiplier,
        "q": found.sampling_probability,
        "sampling": found.sampling.told(),
        "releases": [{"from": first, "to": last, "shares": shares} for first, last, shares in found.shares],
    }


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for a reader: what is released, and how batches are drawn, is said where some run is not as usual in it."""
    said = []
    hidden = {"problem"}  # under the table: `stopped`
    if all(row["sampling"] in (None, POISSON.told()) for row in rows):
        hidden.add("sampling")
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    for row in rows:
        stretches = row["releases"] or []
        said.append(described((one["to"] - one["from"], one["shares"]) for one in stretches) if stretches else None)
    if all(text in (None, GRADIENT) for text in said):
        return [{key: value for key, value in row.items() if key != "releases"} for row in rows]
    return [{**row, "releases": text} for row, text in zip(rows, said, strict=True)]


def stopped(problems: Mapping[str, Sequence[str]], total: int, what: str = "fail") -> list[str]:
    """A line for every problem, with the ids of the runs that it stops."""
    return [
        f"{len(runs)} of {total} runs would {what} ({', '.join(runs[:SHOWN])}{', ...' if len(runs) > SHOWN else ''}): {text}"
        for text, runs in problems.items()
    ]


def to_fetch(fetches: list[Fetch]) -> list[str]:
    """What `dpft prepare` would fetch, a line each."""
    return [
        f"To be fetched: {one.what}, from {one.source}" + (f" ({one.size / 1e6:,.0f} MB)" if one.size else "")
        for one in fetches
    ]


def _choice(spec: RunSpec, found: PrivacyPlan, tries: float) -> dict[str, Any]:
    """What the best of about `tries` runs costs, by the law of their number that costs least, and what each may cost."""
    noise, q, turns = found.noise, found.probability, found.sampling.participations(spec.steps)
    if found.delta == 0:
        return {"problem": "No charge for a choice is known at delta 0; leave out delta, or --tries."}
    if not found.sampling.poisson:
        return {
            "problem": f"No charge for a choice is known with {found.sampling.told()}; leave out --tries, or sampler."
        }
    sigma = noise.noise_multiplier
    if noise.mechanism != "gaussian":
        sigma = covering_gaussian(noise.mechanism, sigma, noise.parameters)
    if sigma is None:
        return {"problem": f"No charge for a choice is known with noise of mechanism {noise.mechanism}."}
    law, epsilon = selection.cheapest(((q, sigma, turns),), found.delta, tries)
    each = selection.epsilon_each(spec.epsilon, found.delta, q, turns, tries)
    return {"law of tries": law, "epsilon of the best": round(epsilon, 3), "epsilon for each": round(each - 5e-4, 3)}


def _dimension(spec: RunSpec, data_dir: Path | None) -> int:
    from dpft.harness.train.run import (
        release_dimension,  # torch and the model, for noise whose epsilon depends on them alone
    )
    from dpft.harness.train.settings import Settings

    return release_dimension(spec, Settings(data_dir))

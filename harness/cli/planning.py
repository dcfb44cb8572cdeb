"""Tables of `dpft plan` about one setting, from accounting alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpft.harness.errors import BadInput

if TYPE_CHECKING:
    from dpft.harness.runs.spec import RunSpec


def noise(runs: Sequence[RunSpec], asked: str, data_dir: Path | None, as_json: bool) -> None:
    """What changes of the plan, or other samplers, cost or buy in noise. asked: --what-if or --samplers, whose notes say more."""
    from dpft.harness.runs import planner
    from dpft.harness.runs.sources import Sources

    spec = _one_setting(runs, asked, ("task", "epsilon", "delta", "batch_size", "steps", "mechanism", "noise_shape"))
    if any(spec.unit == "user" for spec in runs):
        raise BadInput(f"{asked} counts examples; of users `dpft plan --users` says what they cost: leave out unit.")
    size = Sources(data_dir).train_size(spec)
    if asked == "--samplers":
        rows, table = planner.samplers(spec, size, data_dir), planner.samplers_table
    else:
        rows, table = planner.alternatives(spec, size, lambda: _dimension(spec, data_dir), data_dir), planner.table
    _print(rows, table, lambda row: row.get("change") or row["sampler"], planner.NOTES[asked], as_json)


def users(runs: Sequence[RunSpec], data_dir: Path | None, as_json: bool) -> None:
    """What protecting users costs, by how many examples of each count and what is sampled. Raises BadInput for two settings."""
    from dpft.harness.runs import levels, registry
    from dpft.harness.runs.sources import Sources

    spec = _one_setting(runs, "--users", ("task", "epsilon", "delta", "batch_size", "steps"))
    if spec.unit == "user":
        raise BadInput("--users compares ways to protect users; leave out unit, user_sampling and group_size.")
    rows = levels.compared(spec, Sources(data_dir).train_size(spec), data_dir)
    who = registry.task(spec.task)(spec.task_options).users or "not said by the task, so all with k examples"
    note = (
        f"Users: {who}. Noise: of the mean gradient, in C / B of {spec.batch_size:,} examples a step; whole users are clipped to "
        "C over the root of their examples."
    )
    _print(rows, levels.table, lambda row: f"k = {row['group_size']}", note, as_json)


def _one_setting(runs: Sequence[RunSpec], asked: str, keys: Sequence[str]) -> RunSpec:
    """The first of runs that agree in `keys`. Raises BadInput for others."""
    settings = {tuple(getattr(spec, key) for key in keys) for spec in runs}
    if len(settings) > 1:
        raise BadInput(
            f"{asked} is about one setting, and these runs have {len(settings)}; name task, method and epsilon."
        )
    return runs[0]


def _print(rows: list[dict[str, Any]], table: Callable, name: Callable, note: str, as_json: bool) -> None:
    """The rows, why some could not be had, and how to read them."""
    from tabulate import tabulate

    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    click.echo(tabulate(table(rows), headers="keys", tablefmt="github", disable_numparse=True))
    for row in rows:
        if row["problem"]:
            click.echo(f"{name(row)}: {row['problem']}")
    click.echo(note)


def _dimension(spec: RunSpec, data_dir: Path | None) -> int:
    from dpft.harness.train.run import release_dimension  # torch, for noise whose epsilon depends on the model
    from dpft.harness.train.settings import Settings

    return release_dimension(spec, Settings(data_dir))

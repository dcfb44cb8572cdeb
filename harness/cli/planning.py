"""Tables of `dpft plan` about one setting, from accounting alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpft.harness.errors import BadInput

if TYPE_CHECKING:
    from dpft.harness.runs.spec import RunSpec


def users(runs: Sequence[RunSpec], data_dir: Path | None, as_json: bool) -> None:
    """What protecting users costs, by how many examples of each count and what is sampled. Raises BadInput for two settings."""
    from tabulate import tabulate

    from dpft.harness.runs import levels, registry
    from dpft.harness.runs.sources import Sources

    settings = {(s.task, s.epsilon, s.delta, s.batch_size, s.steps) for s in runs}
    if len(settings) > 1:
        raise BadInput(
            f"--users is about one setting, and these runs have {len(settings)}; name task, method and epsilon."
        )
    spec = runs[0]
    if spec.unit == "user":
        raise BadInput("--users compares ways to protect users; leave out unit, user_sampling and group_size.")
    rows = levels.compared(spec, Sources(data_dir).train_size(spec), data_dir)
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    click.echo(tabulate(levels.table(rows), headers="keys", tablefmt="github", disable_numparse=True))
    for row in rows:
        if row["problem"]:
            click.echo(f"k = {row['group_size']}: {row['problem']}")
    who = registry.task(spec.task)(spec.task_options).users or "not said by the task, so all with k examples"
    click.echo(
        f"Users: {who}. Noise: of the mean gradient, in C / B of {spec.batch_size:,} examples a step; whole users are clipped to "
        "C over the root of their examples."
    )

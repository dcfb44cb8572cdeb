"""Fresh processes, one after the other, with progress on stderr; an interrupt keeps what is finished."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import click

from dpft.harness.bench.cells import ENGINES, SECONDS_PER_TOKEN, Job
from dpft.harness.errors import BadInput


@dataclass(frozen=True)
class Record:
    """One process: what it was asked and what it answered (see `worker.run`)."""

    job: Job
    result: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"job": asdict(self.job), "result": self.result}


def run_all(jobs: list[Job]) -> tuple[list[Record], bool]:
    """(records, whether it was interrupted). What failed once is not tried again in later rounds.

    Raises BadInput when model, cell or task are wrong, unless something was measured: that is not thrown away.
    """
    records: list[Record] = []
    failed = set()
    seconds_per_token = None
    with _progress(jobs) as (started, finished, say):
        try:
            for job in jobs:
                if (job.row, job.cell) in failed:
                    finished(job, None)
                    continue
                started(job)
                result = measure(job)
                if result["status"] == "bad input" and seconds_per_token is None:
                    raise BadInput(result["reason"])
                if result["status"] != "done":
                    failed.add((job.row, job.cell))
                records.append(Record(job, result))
                finished(job, result)
                if seconds_per_token is None and result["status"] == "done":
                    seconds_per_token = result["median_s"] / (job.examples * job.length * ENGINES[job.engine])
                    say(_estimate(jobs[1:], seconds_per_token))
        except KeyboardInterrupt:
            return records, True
    return records, False


def measure(job: Job) -> dict[str, Any]:
    """The result of `job`, made by a process of its own, which does not outlive an interrupt."""
    command = [sys.executable, "-m", "dpft.harness.bench.worker", job.to_json(), str(os.getpid())]
    process = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = process.stderr.strip().splitlines() or [f"ended with status {process.returncode}"]
        status = "out of memory" if process.returncode == -9 else "failed"
        return {"status": status, "reason": "killed" if process.returncode == -9 else lines[-1][:500]}


def _estimate(jobs: list[Job], seconds_per_token: float) -> str:
    rest = sum(job.expected_seconds(seconds_per_token) for job in jobs)
    return f"{len(jobs)} more measurements, about {max(1, round(rest / 60))} min."


@contextmanager
def _progress(jobs: list[Job]) -> Iterator[tuple[Callable, Callable, Callable]]:
    """(call with a job at its start, with job and result at its end, with a remark): a bar in a terminal, else lines."""
    count = 0

    def finished(job: Job, result: dict[str, Any] | None) -> None:
        nonlocal count
        count += 1
        if result is not None:
            say(f"[{count}/{len(jobs)}] {label(job)}: {outcome(result)}")

    if not sys.stderr.isatty():
        say = functools.partial(click.echo, err=True)
        yield lambda job: None, finished, say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    # drawn once a second: the bar shares the cores with what is measured
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as bar:
        costs = [job.expected_seconds(SECONDS_PER_TOKEN) for job in jobs]
        task = bar.add_task("starting", total=sum(costs))
        say = functools.partial(bar.console.print, markup=False, highlight=False)

        def advance(job: Job, result: dict[str, Any] | None) -> None:
            bar.advance(task, costs[count])
            finished(job, result)

        yield lambda job: bar.update(task, description=label(job)), advance, say


def label(job: Job) -> str:
    return f"{job.cell.name} {job.row}"


def outcome(result: dict[str, Any]) -> str:
    if result["status"] != "done":
        return f"{result['status']}: {result['reason']}"
    return f"{result['median_s']:.3g} s, {result['peak_bytes'] / 2**20:,.0f} MiB"

"""How work is shown: bars in a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import Any

import click

from dpft.harness.execution.local import Reporter
from dpft.harness.runs.spec import RunSpec


def reporter(total: int, quiet: bool) -> Reporter:
    """The reporter that suits where stderr goes. total: number of runs to be made."""
    if quiet:
        return Quiet()
    return Bars(total) if sys.stderr.isatty() else Lines(total)


class Quiet(Reporter):
    """Says nothing but what went wrong."""

    talks = False

    @contextmanager
    def run(self, spec: RunSpec):
        yield lambda step, row: None

    def finished(self, record: dict[str, Any]) -> None:
        if record["status"] != "done":
            self.note(f"{record['spec']['method']}: {record['status']}: {record['error']}")

    def note(self, text: str, trouble: bool = True) -> None:
        if trouble or self.talks:
            click.echo(text, err=True)


class Lines(Quiet):
    """One line when a run starts, at each evaluation, and when it ends; it names the run where several are made at once."""

    talks = True

    def __init__(self, total: int):
        self.total, self.count, self.going, self.several = total, 0, 0, False

    @contextmanager
    def run(self, spec: RunSpec):
        self.count += 1
        self.going += 1
        self.several = self.several or self.going > 1
        start = time.monotonic()
        self.note(f"[{self.count}/{self.total}] {spec.label()} ({spec.steps} steps)")

        def observe(step: int, row: dict[str, Any]) -> None:
            if row["metric"] is not None:
                of = f"{spec.label()}: " if self.several else ""
                self.note(f"    {of}step {step}/{spec.steps}  {_figures(row)}  {time.monotonic() - start:.0f} s")

        try:
            yield observe
        finally:
            self.going -= 1

    def finished(self, record: dict[str, Any]) -> None:
        of = f"{_label(record)}: " if self.several else ""
        click.echo(f"    {of}{_ending(record)}", err=True)


class Bars(Quiet):
    """Live bars, one for each run in progress, with its current metric and the epsilon spent."""

    talks = True

    def __init__(self, total: int):
        self.total, self.count, self.going, self.bars = total, 0, 0, None

    @contextmanager
    def run(self, spec: RunSpec):
        self.count += 1
        metric: dict[str, float] = {}
        bars = self._shown()
        task = bars.add_task(f"[{self.count}/{self.total}] {spec.label()}", total=spec.steps, info="preparing")

        def observe(step: int, row: dict[str, Any]) -> None:
            if row["metric"] is not None:
                metric["metric"] = row["metric"]
            bars.update(task, completed=step, info=_figures({**row, **metric}))

        self.going += 1
        try:
            yield observe
        finally:
            self.going -= 1
            bars.remove_task(task)
            if not self.going:
                bars.stop()
                self.bars = None

    def _shown(self):
        """The live display, which all runs in progress share: a terminal has room for one."""
        if self.bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[info]}"),
            )
            self.bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bars.start()
        return self.bars

    def finished(self, record: dict[str, Any]) -> None:
        click.echo(f"[{self.count}/{self.total}] {_label(record)}: {_ending(record)}", err=True)


def _label(record: dict[str, Any]) -> str:
    return RunSpec(**record["spec"]).label()


def _figures(row: dict[str, Any]) -> str:
    parts = []
    if row.get("metric") is not None:
        parts.append(f"metric {row['metric']:.4f}")
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.3f}")
    if row.get("epsilon") is not None:
        parts.append(f"epsilon spent {row['epsilon']:.2f}")
    return "  ".join(parts)


def _ending(record: dict[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['status']}: {record['error']}"
    result = record["result"]
    return f"done: {result['metric']} {result['final']:.4f} in {record['cost']['total_s']:.0f} s"

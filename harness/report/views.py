"""Four matched views of the same runs: which rows stand in one table, read where, and what they have in common.

`budget-steps`: equal privacy budget, batch size and steps. `budget`: equal budget, steps and batch size as each method likes
best. `compute` and `time`: every run read where the cheapest one ends. `memory`: only rows under a cap.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.report import origins
from dpft.harness.report import rows as making
from dpft.harness.report.reading import Curves
from dpft.harness.report.rows import Row
from dpft.harness.report.text import told

NAMES = ("budget-steps", "budget", "compute", "time", "memory")
FREE_SETTINGS = ("lr", "steps", "batch_size", "eval_every", "warmup_steps")
FREE_BUDGET = ("sampling_probability", "steps_planned")
MIB = 2**20


@dataclass(frozen=True)
class View:
    """name: one of NAMES; memory_cap: MiB, of `memory` alone."""

    name: str = "budget-steps"
    memory_cap: float | None = None

    def __post_init__(self) -> None:
        if self.name == "memory" and not (self.memory_cap and self.memory_cap > 0):
            raise BadInput("The view `memory` needs a cap above zero; give --memory-cap MIB.")
        if self.name != "memory" and self.memory_cap is not None:
            raise BadInput("A memory cap belongs to the view `memory`; add --view memory.")

    @property
    def steps_free(self) -> bool:
        return self.name != "budget-steps"


@dataclass(frozen=True)
class Group:
    """Rows of one table, best first, with their names and ranks.

    reason: why nothing is ranked, or None. matched: what the view holds equal, in one sentence (None: see the budget).
    every: all rows before the best of each method were chosen. left_out: rows that the view does not admit, and why.
    seeds: that the ranks are over. unranked: name of a row that competes and has no rank of its own fault -> why. notes: what the
    runs were made from, where that differs. stream: of the noise, where the same setting has tables of several, else None.
    """

    rows: list[Row]
    names: list[str]
    ranks: list[int | None]
    reason: str | None
    view: View
    every: list[Row]
    matched: str | None = None
    left_out: list[str] = field(default_factory=list)
    seeds: tuple[int, ...] = ()
    unranked: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stream: int | None = None

    @property
    def spec(self) -> dict[str, Any]:
        return self.rows[0].spec

    @property
    def private(self) -> list[Row]:
        return [row for row in self.rows if row.private]

    @property
    def result(self) -> dict[str, Any]:
        return self.rows[0].records[0]["result"]

    @property
    def title(self) -> str:
        spec, private = self.spec, self.private
        settings = "".join(f", {told(key)}={told(value)}" for key, value in spec["task_options"].items())
        text = f"{spec['task']} (v{spec['task_version']}{settings}), {told(spec['model'])}, head `{spec['head']}`"
        if private:
            text += f", ε ≤ {private[0].spec['epsilon']:g}" + (" (pure)" if private[0].spec.get("delta") == 0 else "")
        text += "" if spec["split"] == "whole" else f", {spec['split']} half"
        text += "" if self.sampler == "poisson" else f", {self.sampler} batches"
        text += "" if self.unit == "example" else f" for every {self.unit}"
        return text + ("" if self.stream is None else f", noise stream {self.stream}")

    @property
    def stem(self) -> str:
        """The beginning of the names of this group's files."""
        private = self.private
        text = f"{self.spec['task']}-{self.spec['model'].replace('/', '-')}"
        text += "" if self.spec["split"] == "whole" else f"-{self.spec['split']}"
        text += "" if self.sampler == "poisson" else f"-{self.sampler}"
        text += "" if self.unit == "example" else f"-{self.unit}"
        return text + ("" if not private else f"-eps{private[0].spec['epsilon']:g}")

    @property
    def sampler(self) -> str:
        """How the batches of its private rows were drawn."""
        return origins.sampler(self.private[0].spec) if self.private else "poisson"

    @property
    def unit(self) -> str:
        """What the budget of its private rows protects."""
        return origins.unit(self.private[0].spec) if self.private else "example"


def arrange(records: list[dict[str, Any]], view: View, curves: Curves, rates: bool = False) -> list[Group]:
    """The tables of `records`, those that failed among them; rates: every learning rate, not only the best of each method.

    A group of which the view admits no row has none, and says in `left_out` why.
    """
    parts = list(_by_hardware(records).values()) if view.name == "time" else [records]
    groups = [_group(rows, view, curves, rates) for part in parts for rows in making.groups(part)]
    streams: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        if group.private:
            streams[group.title].add(origins.noise_stream(group.private[0].spec))
    return [
        replace(group, stream=origins.noise_stream(group.private[0].spec))
        if group.private and len(streams[group.title]) > 1
        else group
        for group in groups
    ]


def _group(rows: list[Row], view: View, curves: Curves, rates: bool) -> Group:
    matched, left_out = None, []
    if view.name == "budget":
        matched = "Matched: the privacy budget; steps and batch size are those that each method does best with."
    elif view.name == "memory":
        rows, left_out = _under(rows, view.memory_cap)
        matched = f"Matched: the privacy budget, and a peak memory of at most {view.memory_cap:,g} MiB; steps are free."
    elif view.name == "compute":
        rows, matched, left_out = _cut(rows, curves, lambda row: row.spec["batch_size"], "{:,.0f} example-gradients")
    elif view.name == "time":
        untimed = [row for row in rows if row.step_s is None]
        rows = [row for row in rows if row.step_s is not None]
        if not rows:
            return Group(
                [], [], [], None, view, [], None, [f"{name}: too short to be timed" for name in making.names(untimed)]
            )
        where = hardware(rows[0].records[0])
        rows, matched, left_out = _cut(rows, curves, lambda row: row.step_s, f"{{:,.0f}} s of steps on {where}")
        left_out = [*left_out, *(f"{name}: too short to be timed" for name in making.names(untimed))]
    every = making.ordered(rows) if rows else []
    free = FREE_SETTINGS if view.steps_free else ("lr",)
    if not rows:
        return Group([], [], [], None, view, [], matched, left_out)
    shown, seeds = making.on_equal_seeds(every if rates else making.best_rates(every, free, view.steps_free))
    shown = making.ordered(shown)
    ranks, reason = making.places(shown, FREE_BUDGET if view.steps_free else (), free)
    names = making.names(shown)
    made = [(record, name, row.private) for name, row in zip(names, shown, strict=True) for record in row.records]
    unranked = {
        name: "; ".join([*row.flaws, *([row.lacks] if row.lacks else [])])
        for name, row in zip(names, shown, strict=True)
        if row.competes and not row.ranked
    }
    return Group(
        shown,
        names,
        ranks,
        reason,
        view,
        every,
        matched,
        left_out,
        seeds,
        unranked,
        origins.notes(*zip(*made, strict=True)),
    )


def _under(rows: list[Row], cap: float) -> tuple[list[Row], list[str]]:
    kept = [row for row in rows if row.peak_bytes <= cap * MIB]
    names = dict(zip(map(id, rows), making.names(rows), strict=True))
    over = [f"{names[id(row)]}: {row.peak_bytes / MIB:,.0f} MiB" for row in rows if row.peak_bytes > cap * MIB]
    return kept, over


def _cut(
    rows: list[Row], curves: Curves, per_step: Callable[[Row], float], form: str
) -> tuple[list[Row], str, list[str]]:
    """Every run as of its last evaluation within what the cheapest competing row spends, where one spends more."""
    ranked = [row for row in rows if row.ranked] or rows
    cap = min(per_step(row) * row.spec["steps"] for row in ranked)
    limits = [min(row.spec["steps"], int(cap / per_step(row) * (1 + 1e-9))) for row in rows]
    said = f"Matched: the privacy target and compute, {form.format(cap)}, what the cheapest row spends"
    if all(limit == row.spec["steps"] for limit, row in zip(limits, rows, strict=True)):
        return rows, f"{said}; no run does more.", []
    names, kept, left_out = making.names(rows), [], []
    for row, name, limit in zip(rows, names, limits, strict=True):
        records = [_until(record, limit, curves) for record in row.records]
        if None in records:
            left_out.append(f"{name}: no evaluation within its first {limit} steps")
        else:
            kept.append(replace(row, records=records))
    return (
        kept,
        f"{said}: runs are read at their last evaluation by then, on the examples of the curve. "
        "They were planned for all their steps, and what they have not spent of ε by then stays unspent.",
        left_out,
    )


def _until(record: dict[str, Any], limit: int, curves: Curves) -> dict[str, Any] | None:
    curve = curves.of(record)
    last = sum(step <= limit for step in curve["step"]) - 1
    if last < 0:
        return None
    cut = {"step": curve["step"][last], "epsilon": curve["epsilon"][last]}
    return {**record, "cut": cut, "result": {**record["result"], "final": curve["metric"][last]}}


def _by_hardware(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Finished runs by the hardware they were made on; runs that failed count on each."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["status"] == "done":
            found[hardware(record)].append(record)
    failed = [record for record in records if record["status"] != "done"]
    return {where: [*made, *failed] for where, made in sorted(found.items())}


def hardware(record: dict[str, Any]) -> str:
    """The hardware id: times of two runs may be compared where this is the same."""
    it = record["provenance"]["hardware"]
    name = told(it.get("gpu") or it["cpu"])
    threads = f", {it['threads']} thread{'s' if it['threads'] != 1 else ''}" if it["device"] == "cpu" else ""
    settings = record["provenance"]["settings"]
    ranks = settings.get("ranks", 1)
    several = f", {ranks} ranks" if ranks != 1 else ""
    again = ", recomputing" if settings.get("recompute") else ""
    parted = ", model sharded" if settings.get("shard_model") else ""
    return f"{name} ({it['device'].partition(':')[0]}{threads}{several}{parted}{again})"


def mean_cut(row: Row) -> tuple[float, float | None] | None:
    """(step, epsilon) at which the runs of a row were cut; None where they were not."""
    cuts = [record["cut"] for record in row.records if "cut" in record]
    if not cuts:
        return None
    spent = [cut["epsilon"] for cut in cuts if cut["epsilon"] is not None]
    return statistics.median(cut["step"] for cut in cuts), statistics.median(spent) if spent else None

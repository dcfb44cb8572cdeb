"""Records of processes -> paired ratios -> markdown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from dpft.harness.bench.cells import BASELINE, WARMUP, Cell
from dpft.harness.bench.launch import Record

PHASES = ("forward", "backward", "clip", "noise", "decode", "optimizer")  # those of probes, which imports torch
PARTS = ("load", "train", "evaluate")  # of a whole run
MARKERS = ("<!-- dpft bench: begin -->", "<!-- dpft bench: end -->")


@dataclass(frozen=True)
class Spread:
    """Median and range over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """None when there are no values."""
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Entry:
    """One row in one cell.

    time, memory: ratios to the baseline of the same cell and round; floor_share: time of the matrix products over measured
    time; seconds, peak_bytes, examples_per_second: medians over the row's processes.
    """

    row: str
    cell: Cell
    status: str
    reason: str | None
    time: Spread | None
    memory: Spread | None
    speed: Spread | None
    floor_share: float | None
    seconds: float | None
    peak_bytes: float | None
    examples_per_second: float | None


def aggregate(records: list[Record], baseline: str) -> list[Entry]:
    """One entry per row and cell, in the order of the first round; `baseline` names the row that ratios are to."""
    base = {(r.job.cell, r.job.round): r.result for r in records if r.job.row == baseline and _done(r)}
    groups: dict[tuple[Cell, str], list[Record]] = {}
    for record in sorted(records, key=lambda r: r.job.round):
        groups.setdefault((record.job.cell, record.job.row), []).append(record)
    return [_entry(group, base) for group in groups.values()]


def _done(record: Record) -> bool:
    return record.result["status"] == "done"


def _entry(group: list[Record], base: dict[tuple[Cell, int], dict[str, Any]]) -> Entry:
    job, done = group[0].job, [r for r in group if _done(r)]
    pairs = [(r.result, base[r.job.cell, r.job.round]) for r in done if (r.job.cell, r.job.round) in base]
    kind = "non_private_s" if job.engine == BASELINE else "private_s"
    shares = [other["floor"][kind] / mine["median_s"] for mine, other in pairs if other.get("floor") and not job.method]
    failed = next((r.result for r in group if not _done(r)), None)
    seconds = statistics.median(r.result["median_s"] for r in done) if done else None
    return Entry(
        row=job.row,
        cell=job.cell,
        status="done" if done else failed["status"],
        reason=failed["reason"] if failed else None,
        time=Spread.of([mine["median_s"] / other["median_s"] for mine, other in pairs]),
        memory=Spread.of([mine["peak_bytes"] / other["peak_bytes"] for mine, other in pairs]),
        speed=Spread.of([other["median_s"] / mine["median_s"] for mine, other in pairs]),
        floor_share=statistics.median(shares) if shares else None,
        seconds=seconds,
        peak_bytes=statistics.median(r.result["peak_bytes"] for r in done) if done else None,
        examples_per_second=job.examples / seconds if seconds else None,
    )


def markdown(records: list[Record], baseline: str, machine: dict[str, Any]) -> str:
    """The header and one table per sequence length."""
    if not records:
        return "Nothing was measured."
    entries = aggregate(records, baseline)
    lengths = list(dict.fromkeys(entry.cell.length for entry in entries))
    make = _waits if records[0].job.whole else _table
    tables = [make([e for e in entries if e.cell.length == length], records) for length in lengths]
    tables.append(_phases(records, entries, baseline))
    parts = [_header(records, entries, baseline, machine), *tables, _troubles(entries)]
    return "\n\n".join(part for part in parts if part)


def _table(entries: list[Entry], records: list[Record]) -> str:
    from tabulate import tabulate

    kind = _kind(records)
    second = {"engine": "floor share", "method": None, "row": "examples/s"}[kind]
    width = 1 if second is None else 2
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    found = {(entry.row, entry.cell): entry for entry in entries}
    headers = [kind, *(title for cell in cells for title in (cell.name, second)[:width])]
    lines = []
    for row in dict.fromkeys(entry.row for entry in entries):
        parts = [_parts(found.get((row, cell)), kind)[:width] for cell in cells]
        lines.append([row, *(text for pair in parts for text in pair)])
    if kind == "engine":
        lines.append(["counted floor", *(text for cell in cells for text in (_counted_floor(records, cell), ""))])
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _waits(entries: list[Entry], records: list[Record]) -> str:
    """Whole runs: training and all of it over the baseline's, and the seconds of each part."""
    from tabulate import tabulate

    lines = []
    for entry in entries:
        found = [r.result["waited"] for r in records if _done(r) and (r.job.row, r.job.cell) == (entry.row, entry.cell)]
        seconds = {part: statistics.median(one[part] for one in found) for part in PARTS} if found else {}
        lines.append([entry.row, *_parts(entry, "engine")[:1], *(f"{seconds[p]:.1f}" if found else "–" for p in PARTS)])
    headers = ["run", f"{entries[0].cell.name}, training", "loading s", "training s", "evaluation s"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _phases(records: list[Record], entries: list[Entry], baseline: str) -> str:
    """Where the time of the rows goes that know it: seconds as shares of the baseline's whole step."""
    from tabulate import tabulate

    base = {e.cell: e.seconds for e in entries if e.row == baseline and e.seconds}
    lines = []
    for entry in entries:
        found = [
            r.result["phases"]
            for r in records
            if _done(r) and (r.job.row, r.job.cell) == (entry.row, entry.cell) and r.result.get("phases")
        ]
        if found and entry.cell in base:
            shares = {name: statistics.median(p.get(name, 0.0) for p in found) / base[entry.cell] for name in PHASES}
            lines.append([entry.row, entry.cell.name, *(f"{shares[name]:.3f}" for name in PHASES)])
    if not lines:
        return ""
    headers = [_kind(records), "cell", *PHASES]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return f"Where the time goes, as shares of the `{baseline}` step:\n\n{table}"


def _kind(records: list[Record]) -> str:
    """What a row is: an engine, a method, or (real sentences) one of four rows."""
    if records[0].job.whole:
        return "engine"
    if records[0].job.task is not None:
        return "row"
    return "method" if any(r.job.method for r in records) else "engine"


def _parts(entry: Entry | None, kind: str) -> tuple[str, str]:
    """(ratios, floor share or examples per second) as printed."""
    if entry is None or entry.status != "done":
        return entry.status if entry else "–", ""
    ratio = entry.speed if kind == "row" else entry.time
    ratios = f"{ratio} / {entry.memory.median:.2f}" if ratio and entry.memory else "–"
    if kind == "row":
        return ratios, f"{entry.examples_per_second:,.1f}"
    return ratios, f"{entry.floor_share:.0%}" if entry.floor_share is not None else ""


def _troubles(entries: list[Entry]) -> str:
    """Why rows are missing, each reason once."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        if entry.reason is not None:
            cells.setdefault((entry.row, entry.status, entry.reason), []).append(entry.cell.name)
    return "\n".join(f"- {row}, {', '.join(names)}: {status}: {why}" for (row, status, why), names in cells.items())


def _floors(records: list[Record], cell: Cell | None = None) -> list[dict[str, float]]:
    chosen = [r for r in records if r.result.get("floor") and cell in (None, r.job.cell)]
    return [r.result["floor"] for r in chosen]


def _counted_floor(records: list[Record], cell: Cell) -> str:
    floors = _floors(records, cell)
    return f"{floors[0]['private_s'] / floors[0]['non_private_s']:.2f}" if floors else "–"


def _header(records: list[Record], entries: list[Entry], baseline: str, machine: dict[str, Any]) -> str:
    job, versions, git = records[0].job, machine["versions"], machine["git"]
    rounds = len({r.job.round for r in records})
    commit = f", git {git['sha'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    threads = next((r.result["threads"] for r in records if _done(r)), None)
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "opacus", "transformers", "dpft"))
    batch = f"one logical batch of {job.logical} examples in microbatches" if job.logical else "one batch"
    data = (
        f"sentences of {job.task}, cut at T tokens, padded within the step"
        if job.task
        else "random tokens, no padding, dropout 0"
    )
    training = "" if _kind(records) == "method" else f"{job.training} fine-tuning, "
    measured = f"each the median of {job.steps} steps after {WARMUP} others"
    if job.whole:
        batch, measured = (
            f"{job.examples} examples in microbatches of {job.batch_size}",
            f"each one run of {job.steps} steps",
        )
    base = [e for e in entries if e.row == baseline and e.seconds]
    absolute = "; ".join(f"{e.cell.name} {e.seconds:.3g} s, {e.peak_bytes / 2**20:,.0f} MiB" for e in base)
    lines = [
        f"{machine['hardware'].get('gpu', machine['hardware']['cpu'])}, threads: {threads}; {named}{commit}.",
        f"{job.model}, {training}{job.precision}, {data}; a step is {batch}: forward, backward, clip, noise, update. "
        f"Rounds of fresh, interleaved processes: {rounds}; {measured}.",
        f"Entries: {'speed' if _kind(records) == 'row' else 'time'} / peak memory, ratios to `{baseline}` of the same round, "
        f"median (min-max). `{baseline}`: {absolute or 'not measured'}.",
    ]
    if _kind(records) == "engine" and (floors := _floors(records)):
        rate = statistics.median(floor["flops_per_second"] for floor in floors) / 1e9
        lines.append(
            f"Floor share: time of the step's matrix products at the rate of the model's own Linear shapes ({rate:,.0f} GFLOP/s) "
            "over measured time; a DP step adds full grams of each trainable Linear layer (its gradient where cheaper), no noise."
        )
    return "\n".join(f"- {line}" for line in lines)

"""Records -> markdown tables. Rows are ranked only where their budgets match; otherwise the reason is printed."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.harness import registry
from dpft.harness.errors import BadInput
from dpft.harness.privacy import matched
from dpft.harness.spec import completed
from dpft.harness.store import Store, atomic
from dpft.harness.thresholds import crossing, relative_target

BEGIN, END = "<!-- dpft report: begin -->", "<!-- dpft report: end -->"
BASELINES = ("dp-sgd", "dp-adam")  # the target of steps-to-threshold is the best of these, as SPECTRAL.md's rule says
FRACTION = 0.9
SETTING = ("task", "task_version", "model", "head", "max_length")


@dataclass(frozen=True)
class Row:
    """One configuration: the records of its seeds."""

    spec: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def method(self) -> str:
        return self.spec["method"]

    @property
    def private(self) -> bool:
        return self.spec["epsilon"] is not None

    @property
    def ranked(self) -> bool:
        """Whether this row competes: private, and not a control. A method this dpft does not know competes."""
        known = registry.methods().get(self.method)
        return self.private and not (known is not None and known.control)

    @property
    def final(self) -> float:
        return statistics.mean(r["result"]["final"] for r in self.records)


def markdown(records: list[dict[str, Any]], store: Store, curves: bool = False) -> str:
    """All tables of `records`, one per (task, model, head, epsilon), then what is not in a table and why.

    curves: under each table another one with the metric at the evaluations.
    """
    if not records:
        return "There are no runs yet; make some with `dpft run`."
    records = [{**r, "spec": completed(r["spec"])} for r in records]
    done = [r for r in records if r["status"] == "done"]
    parts = []
    for rows in map(_ordered, _groups(done)):
        parts.append(_table(rows, store))
        if curves:
            parts.append(_curves(rows, store))
    failed = [r for r in records if r["status"] != "done"]
    if failed:
        lines = [
            f"- `{r['run_id']}` {r['spec']['task']}/{r['spec']['method']}: **{r['status']}**: {r['error']}"
            for r in failed
        ]
        parts.append("Not in a table:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _groups(records: list[dict[str, Any]]) -> list[list[Row]]:
    cells: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        cells[json.dumps({**record["spec"], "seed": None}, sort_keys=True)].append(record)
    rows = [Row(group[0]["spec"], sorted(group, key=lambda r: r["spec"]["seed"])) for group in cells.values()]
    settings: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        settings[tuple(row.spec[key] for key in SETTING)].append(row)
    groups = []
    for _, members in sorted(settings.items(), key=lambda item: [str(v) for v in item[0]]):
        budgets = sorted({row.spec["epsilon"] for row in members if row.private}) or [None]
        controls = [row for row in members if not row.private]
        groups += [[row for row in members if row.private and row.spec["epsilon"] == b] + controls for b in budgets]
    return groups


def _ordered(rows: list[Row]) -> list[Row]:
    """Best first, controls last."""
    sign = 1 if rows[0].records[0]["result"]["higher_is_better"] else -1
    return sorted(rows, key=lambda row: (row.ranked, sign * row.final), reverse=True)


def _table(rows: list[Row], store: Store) -> str:
    from tabulate import tabulate

    spec, result = rows[0].spec, rows[0].records[0]["result"]
    private = [row for row in rows if row.private]
    named = [(_name(row, rows), r["privacy"]) for row in private for r in row.records]
    reason = matched([privacy for _, privacy in named], [name for name, _ in named]) if private else None
    target = _target(rows, result)
    place, cells = 0, []
    for row in rows:
        place += row.ranked
        cells.append({"#": place if row.ranked and reason is None else "", **_cells(row, rows, store, target, result)})
    seeds = sorted({r["spec"]["seed"] for row in rows for r in row.records})
    head = f"### {spec['task']} (v{spec['task_version']}), {spec['model']}, head `{spec['head']}`"
    head += "" if not private else f", ε ≤ {private[0].spec['epsilon']:g}"
    parts = [head, tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True, stralign="right")]
    if private:
        parts.append(_budget(private[0].records[0]["privacy"]))
    if reason is not None:
        parts.append(f"**Not ranked**: {reason}")
    parts.append(_notes(result, target, len(seeds)))
    return "\n\n".join(parts)


def _curves(rows: list[Row], store: Store) -> str:
    """The metric at the evaluations (at most 12 of them), mean over seeds, a column per row of the table above."""
    from tabulate import tabulate

    columns: dict[str, dict[int, str]] = {}
    for row in rows:
        found = defaultdict(list)
        for record in row.records:
            curve = store.curve(record["run_id"])
            for point in curve.filter(curve["metric"].is_not_null()).iter_rows(named=True):
                found[point["step"]].append(point["metric"])
        columns[_name(row, rows)] = {step: f"{statistics.mean(values):.4f}" for step, values in found.items()}
    steps = sorted({step for column in columns.values() for step in column})
    steps = sorted({steps[(i + 1) * len(steps) // min(12, len(steps)) - 1] for i in range(min(12, len(steps)))})
    cells = [{"step": step, **{name: column.get(step, "") for name, column in columns.items()}} for step in steps]
    examples = rows[0].spec["eval_examples"]
    where = "the whole validation split" if examples is None else f"{examples} validation examples"
    metric = rows[0].records[0]["result"]["metric"]
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True, stralign="right")
    return f"Curve: {metric} on {where}, by step.\n\n{table}"


def _target(rows: list[Row], result: dict[str, Any]) -> float | None:
    competing = [row for row in rows if row.ranked]
    plain = [row for row in competing if row.spec["decoder"] == "mean"]
    baselines = [row for row in plain if row.method in BASELINES] or competing
    if not baselines:
        return None
    best = (max if result["higher_is_better"] else min)(row.final for row in baselines)
    return relative_target(best, FRACTION, result["chance"])


def _cells(row: Row, rows: list[Row], store: Store, target: float | None, result: dict[str, Any]) -> dict[str, str]:
    records, privacy = row.records, row.records[0]["privacy"]
    cost = records[0]["cost"]
    uppers = [r["privacy"]["epsilon"][2] for r in records if r["privacy"] and r["privacy"]["epsilon"]]
    steps, spent = _steps(row, store, target, result)
    return {
        "method": _name(row, rows),
        "trainable": f"{cost['trainable_parameters']:,}",
        "ε [certified upper]": f"{max(uppers):.3f}" if uppers else "∞" if privacy is None else "not certified",
        "σ": f"{privacy['noise_multiplier']:.3f}" if privacy else "0",
        f"final {result['metric']}": _spread([r["result"]["final"] for r in records]),
        "steps to threshold": steps,
        "ε at threshold": spent,
        "peak memory": _median([sum(r["cost"]["peak_bytes"].values()) / 2**20 for r in records], "{:,.0f} MiB"),
        "step time": _median([r["cost"]["step_s"] for r in records], "{:.2f} s"),
        "alignment noisy / decoded": " / ".join(
            _median([r["diagnostics"]["alignment"][key] for r in records], "{:.3f}") for key in ("noisy", "decoded")
        ),
    }


def _name(row: Row, rows: list[Row]) -> str:
    """The method, with the settings that tell its rows in this table apart."""
    same = [other.spec for other in rows if other.method == row.method]
    varying = [key for key in row.spec if key != "seed" and any(s[key] != row.spec[key] for s in same)]
    if not varying:
        return row.method
    return f"{row.method} ({', '.join(f'{key}={row.spec[key]}' for key in varying)})"


def _steps(row: Row, store: Store, target: float | None, result: dict[str, Any]) -> tuple[str, str]:
    """(steps, epsilon) to threshold: the median over seeds, where a censored run counts as infinitely late."""
    if target is None:
        return "–", "–"
    found = []
    for record in row.records:
        curve = store.curve(record["run_id"])
        evaluated = curve.filter(curve["metric"].is_not_null())
        hit = crossing(evaluated["step"].to_list(), evaluated["metric"].to_list(), target, result["higher_is_better"])
        spent = None if hit.step is None else curve.filter(curve["step"] == hit.step)["epsilon"][0]
        found.append((float("inf") if hit.step is None else hit.step, spent))
    step, spent = sorted(found, key=lambda item: item[0])[len(found) // 2]  # upper median: censored runs are not hidden
    if step == float("inf"):
        return f"> {row.spec['steps']}", "–"
    return f"{step}", "∞" if not row.private else f"{spent:.2f}"


def _budget(privacy: dict[str, Any]) -> str:
    return (
        f"Budget: ε = {privacy['target']:g}, δ = {privacy['delta']:.3g}; {privacy['adjacency']}; Poisson sampling, "
        f"B = {privacy['expected_batch_size']:,} expected of N = {privacy['num_examples']:,}, T = {privacy['steps_planned']:,} "
        "steps; PRV accountant, upper bound."
    )


def _notes(result: dict[str, Any], target: float | None, seeds: int) -> str:
    text = f"{seeds} seed{'s' if seeds > 1 else ''}. "
    if target is not None:
        text += f"Threshold: {target:.4f}, {FRACTION:.0%} of the way from chance ({result['chance']:g}) to the best DP baseline. "
    return text + (
        "Unnumbered rows are controls. Choices made on validation data (lr, clip norm) are not covered by ε; alignment, curves "
        "and times are non-private diagnostics."
    )


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _median(values: list[float | None], form: str) -> str:
    known = [v for v in values if v is not None]
    return form.format(statistics.median(known)) if known else "–"


def write(text: str, path: Path, check: bool, markers: tuple[str, str] = (BEGIN, END)) -> bool:
    """Put `text` between the `markers` of `path`; with `check` only compare. Returns whether the file was up to date.

    Raises BadInput when the file has no markers or cannot be read or written.
    """
    opening, closing = markers
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({error.strerror}); make it with the lines {opening} and {closing}."
        ) from error
    before, begin, rest = old.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise BadInput(f"{path} lacks the lines {opening} and {closing}; add them where the tables belong.")
    new = f"{before}{opening}\n\n{text}\n\n{closing}{after}"
    if new != old and not check:
        with atomic(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return new == old

"""Tables of rows that may be compared: the comparison itself, what decoders did, theory against measurement, curves."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from dpft.harness.report.rows import Row, name_of, places
from dpft.harness.store import Store
from dpft.harness.thresholds import crossing, relative_target

FRACTION = 0.9


def comparison(rows: list[Row], store: Store) -> str:
    """The table of one group: rank, budget, metric, steps to threshold, cost; whether and why it is not ranked."""
    from tabulate import tabulate

    spec, result = rows[0].spec, rows[0].records[0]["result"]
    private = [row for row in rows if row.private]
    ranks, reason = places(rows)
    target = target_of(rows)
    cells = [
        {"#": rank or "", **_cells(row, rows, store, target, result)} for row, rank in zip(rows, ranks, strict=True)
    ]
    seeds = sorted({r["spec"]["seed"] for row in rows for r in row.records})
    head = f"### {spec['task']} (v{spec['task_version']}), {spec['model']}, head `{spec['head']}`"
    head += "" if not private else f", ε ≤ {private[0].spec['epsilon']:g}"
    parts = [head, tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True, stralign="right")]
    if private:
        parts.append(_budget(private[0].records[0]["privacy"], _accountants(named)))
    if reason is not None:
        parts.append(f"**Not ranked**: {reason}")
    parts.append(_notes(rows, target, len(seeds)))
    return "\n\n".join(parts)


def curves(rows: list[Row], store: Store) -> str:
    """The metric at the evaluations (at most 12 of them), mean over seeds, a column per row of the table above."""
    from tabulate import tabulate

    columns: dict[str, dict[int, str]] = {}
    for row in rows:
        found = defaultdict(list)
        for record in row.records:
            curve = store.curve(record["run_id"])
            for point in curve.filter(curve["metric"].is_not_null()).iter_rows(named=True):
                found[point["step"]].append(point["metric"])
        columns[name_of(row, rows)] = {step: f"{statistics.mean(values):.4f}" for step, values in found.items()}
    steps = sorted({step for column in columns.values() for step in column})
    steps = sorted({steps[(i + 1) * len(steps) // min(12, len(steps)) - 1] for i in range(min(12, len(steps)))})
    cells = [{"step": step, **{name: column.get(step, "") for name, column in columns.items()}} for step in steps]
    examples = rows[0].spec["eval_examples"]
    where = "the whole validation split" if examples is None else f"{examples} validation examples"
    metric = rows[0].records[0]["result"]["metric"]
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True, stralign="right")
    return f"Curve: {metric} on {where}, by step.\n\n{table}"


def target_of(rows: list[Row], fraction: float = FRACTION) -> float | None:
    """The metric at `fraction` of the way from chance to the best DP baseline (to the best method, where there is none)."""
    result = rows[0].records[0]["result"]
    competing = [row for row in rows if row.ranked]
    baselines = [row for row in competing if row.baseline] or competing
    if not baselines:
        return None
    best = (max if result["higher_is_better"] else min)(row.final for row in baselines)
    return relative_target(best, fraction, result["chance"])


def _cells(row: Row, rows: list[Row], store: Store, target: float | None, result: dict[str, Any]) -> dict[str, str]:
    records, privacy = row.records, row.records[0]["privacy"]
    cost = records[0]["cost"]
    uppers = [r["privacy"]["epsilon"][2] for r in records if r["privacy"] and r["privacy"]["epsilon"]]
    steps, spent = _steps(row, store, target)
    return {
        "method": name_of(row, rows),
        "trainable": f"{cost['trainable_parameters']:,}",
        "ε [certified upper]": f"{max(uppers):.3f}" if uppers else "∞" if privacy is None else "not certified",
        "σ": f"{privacy['noise_multiplier']:.3f}" if privacy else "0",
        f"final {result['metric']}": spread([r["result"]["final"] for r in records]),
        "steps to threshold": steps,
        "ε at threshold": spent,
        "peak memory": median([sum(r["cost"]["peak_bytes"].values()) / 2**20 for r in records], "{:,.0f} MiB"),
        "step time": median([r["cost"]["step_s"] for r in records], "{:.2f} s"),
        "alignment noisy / decoded": " / ".join(
            median([r["diagnostics"]["alignment"][key] for r in records], "{:.3f}") for key in ("noisy", "decoded")
        ),
    }


def reached(row: Row, store: Store, target: float | None) -> tuple[float, float | None] | None:
    """(steps, epsilon spent by then) to `target`: the median over seeds, where a censored run counts as infinitely late."""
    if target is None:
        return None
    found = []
    for record in row.records:
        curve = store.curve(record["run_id"])
        evaluated = curve.filter(curve["metric"].is_not_null())
        better = record["result"]["higher_is_better"]
        hit = crossing(evaluated["step"].to_list(), evaluated["metric"].to_list(), target, better)
        spent = None if hit.step is None else curve.filter(curve["step"] == hit.step)["epsilon"][0]
        found.append((float("inf") if hit.step is None else hit.step, spent))
    return sorted(found, key=lambda item: item[0])[len(found) // 2]  # upper median: censored runs are not hidden


def _steps(row: Row, store: Store, target: float | None) -> tuple[str, str]:
    found = reached(row, store, target)
    if found is None:
        return "–", "–"
    step, spent = found
    if step == float("inf"):
        return f"> {row.spec['steps']}", "–"
    return f"{step}", "∞" if not row.private else f"{spent:.2f}"


def _accountants(named: list[tuple[str, dict[str, Any]]]) -> str:
    """Which accountants certified the rows, as the end of a sentence."""
    if all(privacy.get("mechanism", "gaussian") == "gaussian" for _, privacy in named):
        return "PRV accountant, upper bound."
    return (
        "upper bounds of the PRV accountant (Gaussian; Laplace coordinates through the Gaussian that covers them) and of "
        "privacy loss distributions with revealed scale (spherical noise)."
    )


def _budget(privacy: dict[str, Any], accountants: str) -> str:
    return (
        f"Budget: ε = {privacy['target']:g}, δ = {privacy['delta']:.3g}; {privacy['adjacency']}; Poisson sampling, "
        f"B = {privacy['expected_batch_size']:,} expected of N = {privacy['num_examples']:,}, T = {privacy['steps_planned']:,} "
        f"steps; {accountants}"
    )


def _notes(rows: list[Row], target: float | None, seeds: int) -> str:
    result = rows[0].records[0]["result"]
    text = f"{seeds} seed{'s' if seeds > 1 else ''}. "
    if target is not None:
        text += f"Threshold: {target:.4f}, {FRACTION:.0%} of the way from chance ({result['chance']:g}) to the best DP baseline. "
    grids = {row.grid for row in rows if row.grid}
    if grids:
        rates = "; ".join(", ".join(f"{lr:g}" for lr in grid) for grid in sorted(grids))
        text += f"Of each method the best learning rate by the final metric ({rates}), of the baseline all of them. "
    return text + (
        "Unnumbered rows are controls. Choices made on validation data (lr, clip norm) are not covered by ε; alignment, curves "
        "and times are non-private diagnostics."
    )


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def median(values: list[float | None], form: str) -> str:
    known = [v for v in values if v is not None]
    return form.format(statistics.median(known)) if known else "–"

"""The tables of one group: the comparison itself and the curves."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dpft.harness.privacy import units
from dpft.harness.privacy.samplings import of_event
from dpft.harness.report import budgets
from dpft.harness.report.reading import Curves, Target
from dpft.harness.report.rows import Row, over
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import MIB, Group, mean_cut
from dpft.harness.statistics.thresholds import relative_target

FRACTION = 0.9


def comparison(group: Group, curves: Curves, public: bool = False) -> list[Part]:
    """The table of one group: rank, budget, metric, steps to threshold, cost; whether and why it is not ranked."""
    target = target_of(group.rows, curves)
    cells = [
        {
            "#": "" if rank is None else str(rank),
            "method": name,
            "runs": row.runs,
            **_cells(row, group, curves, target, public),
        }
        for rank, name, row in zip(group.ranks, group.names, group.rows, strict=True)
    ]
    parts: list[Part] = [f"### {group.title}", Table(cells)]
    privacies = [r["privacy"] for row in group.private for r in row.records if r["privacy"] and not r.get("rejected")]
    if privacies:
        parts.append(budget(privacies, group.view.steps_free))
    shared = budgets.line(group.rows, group.names)
    if shared is not None:
        parts.append(shared)
    if group.matched is not None:
        parts.append(group.matched)
    if group.left_out:
        parts.append(f"Left out: {'; '.join(group.left_out)}.")
    if group.reason is not None:
        parts.append(f"**Not ranked**: {group.reason}")
    if group.unranked:
        parts.append(f"**Without a rank**: {'; '.join(f'{name}: {why}' for name, why in group.unranked.items())}.")
    parts += group.notes
    parts.append(_notes(group, target, public))
    return parts


def curve_table(group: Group, curves: Curves) -> list[Part]:
    """The metric at the evaluations (at most 12 of them), mean over seeds, a column per row of the table above."""
    columns: dict[str, dict[int, str]] = {}
    for name, row in zip(group.names, group.rows, strict=True):
        columns[name] = {step: f"{value:.4f}" for step, value in mean_curve(row, curves, "metric").items()}
    steps = sorted({step for column in columns.values() for step in column})
    steps = sorted({steps[(i + 1) * len(steps) // min(12, len(steps)) - 1] for i in range(min(12, len(steps)))})
    cells = [{"step": str(step), **{name: column.get(step, "") for name, column in columns.items()}} for step in steps]
    on = " or ".join(dict.fromkeys(examples_of(row.spec) for row in group.rows))
    return [f"Curve: {group.result['metric']} on {on}, by step.", Table(cells)]


def mean_curve(row: Row, curves: Curves, column: str) -> dict[int, float]:
    """Step -> mean over seeds, at the evaluations at which the column has a value."""
    found = defaultdict(list)
    for record in row.records:
        curve = curves.of(record)
        for step, value in zip(curve["step"], curve[column], strict=True):
            if value is not None:
                found[step].append(value)
    return {step: statistics.mean(found[step]) for step in sorted(found)}


def target_of(rows: Sequence[Row], curves: Curves, fraction: float = FRACTION) -> Target | None:
    """The metric at `fraction` of the way from chance to where the curve of the best DP baseline ends.

    Of the best ranked row, where there is no baseline; None where nothing is ranked. It comes from the curves, on whose examples
    it is looked for, not from the final values: these are of the whole split, which may be harder or easier.
    """
    competing = measure_of(rows)
    ends = [(end, row) for row in competing if (end := curves.end(row)) is not None]
    if not ends:
        return None
    best, row = (max if competing[0].higher_is_better else min)(ends, key=lambda pair: pair[0])
    value = relative_target(best, fraction, row.records[0]["result"]["chance"])
    return Target(value, row.spec["eval_examples"])


def measure_of(rows: Sequence[Row]) -> list[Row]:
    """The rows that others are measured by: ranked baselines, else all ranked rows."""
    competing = [row for row in rows if row.ranked]
    return [row for row in competing if row.baseline] or competing


def _cells(row: Row, group: Group, curves: Curves, target: Target | None, public: bool) -> dict[str, str]:
    records = row.records
    uppers = [upper for r in records if (upper := certified(r)) is not None]
    steps, spent = _steps(row, curves, target)
    cut = mean_cut(row)
    cells = {
        "trainable": f"{records[0]['cost']['trainable_parameters']:,}",
        "ε [certified upper]": f"{max(uppers):.3f}" if uppers else "not certified" if row.private else "∞",
        "σ": _noise(records[0]) if row.private else "0",
        f"final {group.result['metric']}": spread([r["result"]["final"] for r in records]),
    }
    if cut is not None:
        cells["at step (ε spent)"] = f"{cut[0]:g} ({'∞' if cut[1] is None else f'{cut[1]:.2f}'})"
    cells |= {
        "steps to threshold": steps,
        "ε at threshold": spent,
        "peak memory": f"{row.peak_bytes / MIB:,.0f} MiB",
        "step time": "–" if row.step_s is None else f"{row.step_s:.2f} s",
    }
    if not public:
        alignment = [r["diagnostics"]["alignment"] for r in records]
        cells["alignment noisy / decoded"] = " / ".join(
            median([a[key] for a in alignment], "{:.3f}") for key in ("noisy", "decoded")
        )
    return cells


def _steps(row: Row, curves: Curves, target: Target | None) -> tuple[str, str]:
    found = curves.median_reached(row, target)
    if found is None:
        return "–", "–"
    if found.step == float("inf"):
        cut = mean_cut(row)
        return f"> {row.spec['steps'] if cut is None else cut[0]:g}", "–"
    spent = "–" if found.epsilon is None else f"{found.epsilon:.2f}"
    return f"{found.step:g}", spent if row.private else "∞"


def certified(record: dict[str, Any]) -> float | None:
    """The certified upper epsilon of a run; None where there is none, or the record of one that does not verify is malformed."""
    values = record["privacy"].get("epsilon") if isinstance(record["privacy"], dict) else None
    return values[2] if isinstance(values, list) and len(values) == 3 and isinstance(values[2], (int, float)) else None


def _noise(record: dict[str, Any]) -> str:
    value = record["privacy"].get("noise_multiplier") if isinstance(record["privacy"], dict) else None
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def _accountants(privacies: list[dict[str, Any]]) -> str:
    """Which accountants certified the rows."""
    if all(privacy["delta"] == 0 for privacy in privacies):
        return "pure ε in closed form, T log(1 + q (exp(1/b) − 1)) of Laplace noise of scale b C on one number a step"
    if all(privacy.get("mechanism", "gaussian") == "gaussian" for privacy in privacies):
        others = any(not of_event(event).poisson for privacy in privacies for event in privacy["ledger"][:1])
        return "PRV accountant, upper bound" + " (privacy loss distributions where it has no such sampling)" * others
    return (
        "upper bounds of the PRV accountant (Gaussian; Laplace coordinates through the Gaussian that covers them) and of "
        "privacy loss distributions with revealed scale (spherical noise)"
    )


def budget(privacies: list[dict[str, Any]], steps_free: bool, only: bool = True) -> str:
    """What the rows of a table have spent, and how it is counted. only: no other epsilon stands beside it."""
    privacy = privacies[0]
    promised = f"δ = {privacy['delta']:.3g}" if privacy["delta"] else "δ = 0 (pure)"
    spent = f"ε = {privacy['target']:g}, {promised}" if only else promised
    text = f"Budget: {spent}; {privacy['adjacency']}; {_drawn(privacies, only)}, "
    if units.of(privacy) == "user":
        text += units.told(privacies)
        if not steps_free:
            each = privacy["sampling_probability"] * privacy["num_examples"]
            text += f"; {each:,.4g} examples expected a step, T = {privacy['steps_planned']:,} steps"
    elif steps_free:
        text += f"N = {privacy['num_examples']:,}"
    else:
        text += (
            f"B = {privacy['expected_batch_size']:,} expected of N = {privacy['num_examples']:,}, "
            f"T = {privacy['steps_planned']:,} steps"
        )
    return f"{text}; {_accountants(privacies)}."


def _drawn(privacies: list[dict[str, Any]], all_of_them: bool) -> str:
    """How the batches of the rows were drawn; rows of one table have one kind of sampling, with numbers of their own."""
    said = {
        of_event(event).told() + " of users" * (units.sampled(privacy)[0] == "num_users")
        for privacy in privacies
        for event in privacy["ledger"][:1]
    }
    if len(said) > 2 and not all_of_them:
        return "batches drawn as the rows say"
    return " or ".join(sorted(said, key=lambda text: (len(text), text)))


def examples_of(spec: dict[str, Any]) -> str:
    """What the curve of a run is measured on."""
    examples, split = spec["eval_examples"], spec["split"]
    if examples is not None:
        return f"{examples} validation examples" + ("" if split == "whole" else f" of the {split} half")
    return "the whole validation split" if split == "whole" else f"the {split} half of the validation split"


def _notes(group: Group, target: Target | None, public: bool) -> str:
    text = _seeds(group)
    if target is not None:
        examples = examples_of({**group.spec, "eval_examples": target.examples})
        best = "DP baseline" if any(row.baseline for row in measure_of(group.rows)) else "ranked row"
        text += (
            f"Threshold: {target.value:.4f}, {FRACTION:.0%} of the way from {group.result.get('chance_is', 'chance')} "
            f"({group.result['chance']:g}) to where the curve of the best {best} ends, on {examples} like the curves; "
            "–: the evaluations cannot tell. "
        )
    grids = {row.grid for row in group.rows if row.grid}
    if grids:
        rates = "; ".join(", ".join(f"{lr:g}" for lr in grid) for grid in sorted(grids))
        text += f"Of each method the best learning rate by the final metric ({rates})"
        text += ". " if group.view.steps_free else ", of the baseline all of them. "
    diagnostics = "curves and times" if public else "alignment, curves and times"
    return text + (
        f"{_unnumbered(group)}Choices made on validation data (lr, clip norm) are not covered by ε; "
        f"{diagnostics} are non-private diagnostics."
    )


def _seeds(group: Group) -> str:
    """Which seeds the ranks rest on, or how many seeds the rows have."""
    if group.seeds:
        return f"{over(group.seeds)} "
    fewest, most = (pick(len(row.records) for row in group.rows) for pick in (min, max))
    return f"{most} seed{'s' if most > 1 else ''}. " if fewest == most else f"{fewest} to {most} seeds a row. "


def _unnumbered(group: Group) -> str:
    others = any(
        row.ranked and rank is None and group.reason is None for row, rank in zip(group.rows, group.ranks, strict=True)
    )
    return f"Unnumbered rows are controls{' and other learning rates of a method that has a rank' if others else ''}. "


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def median(values: Sequence[float | None], form: str) -> str:
    known = [v for v in values if v is not None]
    return form.format(statistics.median(known)) if known else "–"

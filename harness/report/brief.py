"""One screen a study: at most six columns, one line a method, what is equal everywhere said once in the caption."""

from __future__ import annotations

from collections.abc import Iterator

from dpft.harness.report.figures import Figures, stems
from dpft.harness.report.glance import Named, picture, usual_baseline
from dpft.harness.report.labels import labels
from dpft.harness.report.pairs import Verdicts, verdicts
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import budget, spread
from dpft.harness.report.text import Part, Table, told
from dpft.harness.report.views import Group

MOST, LINES, LONG = 6, 20, 250  # columns, rows, characters of a budget that stands alone
SIGNS = {"better": "▲", "worse": "▼", "the same": "≈"}


def parts(groups: list[Group], baseline: str | None, pictures: Figures | None) -> Iterator[Part]:
    """For every task and model one table of all its budgets, and a picture of the largest of them."""
    if not groups:
        yield "There are no runs yet; make some with `dpft run`."
    names = dict(zip(map(id, groups), stems(groups), strict=True))
    for several in settings(groups):
        made = [verdicts(group, baseline) for group in several]
        firsts = [_first(group) for group in several]
        base = usual_baseline(row for first in reversed(firsts) for row in first.values())
        yield f"**{title(several)}**"
        yield Table(list(_cells(several, firsts, made, base)), names_left=True)
        spent, *more = _caption(several, firsts, made, base)
        yield from (spent, " ".join(more)) if len(spent) > LONG else (" ".join((spent, *more)),)
        if pictures is not None:
            drawn = picture(list(zip(map(epsilon, several), firsts, strict=True)), several[0].result["metric"])
            if drawn is not None:
                caption, draw = drawn
                name = f"{names[id(several[-1])]}-brief.svg"
                yield f"![{caption}]({pictures.draw(name, draw, size=(6.4, 3.4), neutral=True)})"


def settings(groups: list[Group]) -> list[list[Group]]:
    """Groups that differ in their budget alone, the smallest epsilon first."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(title([group]), []).append(group)
    return [sorted(several, key=epsilon) for several in found.values()]


def title(several: list[Group]) -> str:
    spec = several[0].spec
    own = "".join(f", {told(key)}={told(value)}" for key, value in spec["task_options"].items() if key != "content")
    half = "" if spec["split"] == "whole" else f", {spec['split']} half"
    stream = "" if several[0].stream is None else f", noise stream {several[0].stream}"
    return f"{spec['task']}{own}, {told(spec['model'])}{half}{stream}"


def epsilon(group: Group) -> float:
    return group.private[0].spec["epsilon"] if group.private else float("inf")


def _first(group: Group) -> Named:
    """Short name -> the row of each method that has a rank or is a control; other rates of a ranked method are left out."""
    ranked = {row.method for row, rank in zip(group.rows, group.ranks, strict=True) if rank is not None}
    kept = [
        (name, row)
        for name, row, rank in zip(group.names, group.rows, group.ranks, strict=True)
        if rank is not None or row.method not in ranked
    ]
    names, rows = [name for name, _ in kept], [row for _, row in kept]
    return dict(zip(labels(rows, names), rows, strict=True))


def _cells(
    several: list[Group], firsts: list[Named], made: list[Verdicts | None], base: Row | None
) -> Iterator[dict[str, str]]:
    metric = several[0].result["metric"]
    order = dict.fromkeys(name for first in reversed(firsts) for name in first)
    for name in _few(list(order), firsts[-1]):
        cells = {"method": name}
        for group, first, found in zip(several, firsts, made, strict=True):
            column = metric if len(several) == 1 else f"ε {epsilon(group):g}"
            cells[column] = _value(first.get(name), group, found)
        if _has_costs(several):
            row = next(first[name] for first in reversed(firsts) if name in first)
            cells["memory"] = _ratio(row.peak_bytes, base and base.peak_bytes)
            processor = base is not None and None not in (row.step_cpu_s, base.step_cpu_s)
            time = "step_cpu_s" if processor else "step_s"
            cells["step time"] = _ratio(getattr(row, time), base and getattr(base, time))
        yield cells


def _has_costs(several: list[Group]) -> bool:
    """Whether there is room for memory and time beside the budgets."""
    return len(several) + 3 <= MOST


def _few(names: list[str], first: Named) -> list[str]:
    """The best of many, the controls, and the baseline."""
    if len(names) <= LINES:
        return names
    kept = [name for name in names if name in first and (first[name].baseline or not first[name].competes)]
    rest = [name for name in names if name not in kept][: LINES - len(kept)]
    return [name for name in names if name in kept or name in rest]


def _value(row: Row | None, group: Group, found: Verdicts | None) -> str:
    if row is None:
        return "–"
    text = spread([r["result"]["final"] for r in row.records], digits=3)
    full = next(name for name, other in zip(group.names, group.rows, strict=True) if other is row)
    if found is not None and full in found.found:
        sign = next((mark for word, mark in SIGNS.items() if found.found[full].verdict.startswith(word)), "")
        text += f" {sign}" if sign else ""
    return text


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}"


def _caption(several: list[Group], firsts: list[Named], made: list[Verdicts | None], base: Row | None) -> Iterator[str]:
    """The budget, whether verdicts are in, and what the columns are ratios of."""
    group = several[-1]
    privacies = [r["privacy"] for row in group.private for r in row.records if r["privacy"] and not r.get("rejected")]
    if privacies:
        yield budget(privacies, group.view.steps_free, only=len(several) == 1)
    if len(several) > 1:
        yield f"Columns: {group.result['metric']} at ε."
    seeds = sorted({len(row.records) for one in several for row in one.rows})
    yield f"Seeds: {seeds[0] if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'}."
    known = [one for one in made if one is not None]
    said = [comparison.verdict for one in known for comparison in one.found.values()]
    if said and not any(verdict.startswith(tuple(SIGNS)) for verdict in said):
        reason = f" ({said[0].partition(': ')[2]})" if len(set(said)) == 1 and ": " in said[0] else ""
        yield f"None of {len(said)} differences to {known[0].baseline.method} can be told from chance{reason}."
    elif said:
        yield f"▲ better, ▼ worse than {known[0].baseline.method}, ≈ the same; no sign: cannot tell."
    reasons = {one.reason for one in several if one.reason}
    for reason in sorted(reasons):
        yield f"Not ranked: {reason}"
    rows = max(map(len, firsts))
    if rows > LINES:
        yield f"The best of {rows} rows; all of them in the full tables."
    if _has_costs(several) and base is not None:
        yield f"Memory and time over those of {base.method}."

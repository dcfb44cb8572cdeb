"""One table of all methods: what trains, what is asked, what it costs beside dp-adam, what was claimed, what we found."""

from __future__ import annotations

from typing import Any

from dpft.harness.report import rows as making
from dpft.harness.report.pairs import verdicts
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import spread
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import Group
from dpft.harness.runs import registry


def overview(groups: list[Group], baseline: str | None) -> list[Part]:
    """A table for every group: all rows with their costs as ratios to the baseline's, and methods that have no row."""
    parts: list[Part] = []
    for group in groups:
        parts += [f"### {group.title}", *_table(group, baseline)]
    return parts or ["There are no runs yet; make some with `dpft run rows`."]


def _table(group: Group, baseline: str | None) -> list[Part]:
    made = verdicts(group, baseline)
    base = next((row for row in group.rows if row.method == (baseline or "dp-adam") and row.ranked), None)
    full = {id(row): name for name, row in zip(group.names, group.rows, strict=True)}
    rows = making.ordered([making.ordered(grid)[0] for grid in making.alike(group.rows)])
    short = making.names([Row({**row.spec, "lr": None}, row.records) for row in rows])
    cells = []
    for name, row in zip(short, rows, strict=True):
        known = registry.methods().get(row.method)
        found = made.found.get(full[id(row)]) if made else None
        cells.append(
            {
                "method": _linked(name, known),
                "what trains": known.summary if known else "–",
                "numbers that train": f"{row.records[0]['cost']['trainable_parameters']:,}",
                "what it asks": _asked(row),
                "lr": f"{row.spec['lr']:g}",
                "time": _ratio(row.step_cpu_s, base.step_cpu_s if base else None),
                "memory": _ratio(row.peak_bytes, base.peak_bytes if base else None),
                "claimed": (known.claim if known else "") or "–",
                f"{group.result['metric']} here": spread([r["result"]["final"] for r in row.records]),
                "beside the baseline": "–" if found is None else f"{found.difference:+.3f}, {found.verdict}",
            }
        )
    missing = sorted(registry.methods().keys() - {row.method for row in group.rows})
    parts: list[Part] = [Table(cells)]
    if base is not None:
        parts.append(
            f"Time: processor seconds of a step, memory: peak of live bytes, both over those of {base.method}; mean over all "
            "kinds of steps, and over seeds."
        )
    if missing:
        parts.append(f"Without a run here: {', '.join(missing)}.")
    return parts


def _linked(name: str, known: Any) -> str:
    kind, _, number = (known.reference if known else "").partition(":")
    return f"[{name}](https://arxiv.org/abs/{number})" if kind == "arXiv" else name


def _asked(row: Row) -> str:
    """The releases of each kind of step, as the ledger has them."""
    if not row.private:
        return "everything"
    if row.records[0].get("rejected"):
        return "–"
    kinds = dict.fromkeys(
        " + ".join(release["name"] for release in event["releases"]) for event in row.records[0]["privacy"]["ledger"]
    )
    return "; then ".join(kinds)


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}"

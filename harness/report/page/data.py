"""Records -> what the page embeds: an index of rows (all that answers, table and pictures need) and runs in blocks.

Groups, rows, ranks and verdicts are those of the report (`harness/report`): nothing is ranked or averaged here.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dpft.harness import statistics as st
from dpft.harness.records.store import Store
from dpft.harness.report import Options, Report, brief, pairs
from dpft.harness.report import rows as making
from dpft.harness.report.page import answers, entries
from dpft.harness.report.page.foot import made
from dpft.harness.report.text import plain
from dpft.harness.report.views import Group
from dpft.harness.runs.spec import completed

BLOCK = 64  # runs that are packed together, and unpacked together when one of them is looked at
POINTS = 120  # of one curve; evaluations always stay
CURVE = ("step", "epsilon", "metric")
DIAGNOSTIC_CURVE = ("loss", "alignment_noisy", "alignment_decoded", "clipped_fraction")
SUMMARIES = ("private", "alignment", "clipped_fraction")  # of the diagnostics; the rest is a row per matrix and step


class Prepared(NamedTuple):
    """A run as the page needs it: shown, packed into its block; kept, until the index is made."""

    shown: dict[str, Any]
    kept: dict[str, Any]


class Builder:
    """Takes records one by one, gives packed blocks as they fill up, and the index at the end.

    What it keeps of a record is what ranking needs; a folder of any size is read once.
    """

    def __init__(self, store: Store, options: Options):
        """options: of these `public` (no diagnostics, which are computed from clean gradients and not covered by epsilon, and no
        texts, which are validation rows) and `baseline` count."""
        self.store, self.options = store, Options(public=options.public, baseline=options.baseline)
        self.kept: list[dict[str, Any]] = []

    def prepare(self, record: dict[str, Any]) -> Prepared:
        """Reads the curve of the run, and nothing else."""
        diagnostics = record["diagnostics"] or {}
        summaries = {key: diagnostics[key] for key in SUMMARIES if key in diagnostics}
        curve = None
        if record["status"] == "done" or self.store.has_curve(record["run_id"]):
            curve = _thinned(self.store.curve(record["run_id"]), self.columns)
        result = record["result"] and {key: value for key, value in record["result"].items() if key != "samples"}
        public = self.options.public
        shown = {**record, "spec": completed(record["spec"]), "result": result if public else record["result"]}
        shown |= {"diagnostics": None if public else summaries, "curve": curve}
        return Prepared(shown, {**record, "diagnostics": summaries, "result": result, "curve": curve is not None})

    def blocks(self, runs: Iterable[Prepared]) -> Iterator[str]:
        """Base64 of the gzipped JSON of up to BLOCK runs."""
        block: list[dict[str, Any]] = []
        for run in runs:
            block.append(run.shown)
            self.kept.append({**run.kept, "position": len(self.kept)})
            if len(block) == BLOCK:
                yield packed(block)
                block = []
        if block:
            yield packed(block)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the curves that the page shows."""
        return CURVE if self.options.public else CURVE + DIAGNOSTIC_CURVE

    def index(self) -> dict[str, Any]:
        """Answers; groups and rows in the order and with the ranks of the markdown report; runs that are in no table last."""
        report = Report(self.kept, self.store, self.options)
        boards, decided = answers.of_boards({record["run_id"]: record for record in self.kept})
        lines: entries.Entries = {}
        groups, told, best = [], [], []
        for number, group in enumerate(report.groups):
            verdicts = pairs.verdicts(group, self.options.baseline)
            named = entries.add(lines, number, group, verdicts)
            called = {name: entry["label"] for name, entry in named.items()}
            groups.append(_group(group, verdicts, named))
            told.append(None if _of(group, decided) else answers.of_group(group, verdicts, called))
            best.append(
                [
                    (entry, row.final)
                    for row, name in zip(group.rows, group.names, strict=True)
                    if (entry := named.get(name)) is not None and row.ranked
                ]
            )
        rows = list(lines.values())
        for row in rows:
            row["verdict"] = next((decided[run_id] for run_id in row["ids"] if run_id in decided), row["verdict"])
        shown = {run_id for row in rows for run_id in row["ids"]}
        rows += [
            entries.alone(r, len(rows) + i) for i, r in enumerate(r for r in self.kept if r["run_id"] not in shown)
        ]
        numbers = {id(group): number for number, group in enumerate(report.groups)}
        settings = [[numbers[id(group)] for group in several] for several in brief.settings(report.groups)]
        counted = {s: sum(r["status"] == s for r in self.kept) for s in sorted({r["status"] for r in self.kept})}
        return {
            "block": BLOCK,
            "summary": f"{len(self.kept):,} runs: "
            + (", ".join(f"{n:,} {s}" for s, n in counted.items()) or "none yet"),
            "columns": [key for key in self.columns if key not in ("step", "epsilon")],
            "answers": boards + _answers(report.groups, settings, told),
            "settings": [
                {
                    "title": _title(report.groups, several),
                    "groups": several,
                    "front": _front(report.groups, several, best),
                }
                for several in settings
            ],
            "groups": groups,
            "rows": rows,
            "foot": made(self.kept),
        }


def packed(value: Any) -> str:
    """Base64 of the gzipped JSON; the same bytes for the same value. JSON has no NaN: such numbers become null."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thinned(curve, columns: tuple[str, ...]) -> dict[str, list]:
    """The columns of a curve (polars) at its evaluations and at evenly spaced steps between; four digits are enough to draw."""
    every = max(1, -(-curve.height // POINTS))
    if every > 1:
        curve = curve.filter(curve["metric"].is_not_null() | (curve["step"] % every == 0))
    found = {key: curve[key].to_list() for key in columns if key in curve.columns}
    return {key: values if key == "step" else [_rounded(v) for v in values] for key, values in found.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _group(group: Group, verdicts: pairs.Verdicts | None, named: dict[str, dict[str, Any]]) -> dict[str, Any]:
    result = group.result
    lines = [making.over(group.seeds)] if group.seeds and group.reason is None else []
    if verdicts is not None:
        lines.append(f"Verdicts: against {verdicts.base}, paired by seed.")
    lines += group.notes
    fronts, left = pairs.fronts(group)
    timed = [names for cost, names in fronts.items() if cost != "memory"] if not left else []
    return {
        "title": plain(group.title).replace("`", ""),
        "epsilon": entries.budget(group),
        "reason": group.reason,
        "note": plain(" ".join(lines)) or None,
        "metric": result["metric"],
        "chance": result["chance"],
        "higher_is_better": result["higher_is_better"],
        "fronts": {
            "peak": [named[name]["number"] for name in fronts.get("memory", ()) if name in named],
            "step_s": [named[name]["number"] for name in timed[0] if name in named] if len(timed) == 1 else None,
        },
    }


def _title(groups: list[Group], several: list[int]) -> str:
    return plain(brief.title([groups[number] for number in several]))


def _answers(groups: list[Group], settings: list[list[int]], told: list[dict | None]) -> list[dict[str, Any]]:
    """A setting's answers at each of its budgets; none where a leaderboard has answered."""
    lines = [(_title(groups, several), [told[n] for n in several if told[n] is not None]) for several in settings]
    return [{"title": title, "lines": found} for title, found in lines if found]


def _front(groups: list[Group], several: list[int], best: list[list[tuple[dict, float]]]) -> list[int]:
    """Lines on the front of the metric against epsilon."""
    points = [
        (brief.epsilon(groups[n]), entry["number"], final)
        for n in several
        if groups[n].reason is None
        for entry, final in best[n]
    ]
    if not points:
        return []
    budgets, numbers, finals = zip(*points, strict=True)
    on = st.front(budgets, finals, groups[several[0]].result["higher_is_better"])
    return [number for number, keep in zip(numbers, on, strict=True) if keep]


def _of(group: Group, decided: dict[str, str]) -> bool:
    """Whether these are runs of a leaderboard, of tuning or tests."""
    return bool(decided) and group.spec["split"] != "whole"

"""Records -> markdown, LaTeX, CSV and pictures. Rows are ranked only where they match; otherwise the reason is printed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpft.harness.border.files import text as read_text
from dpft.harness.errors import BadInput, unknown
from dpft.harness.records.store import Store, atomic
from dpft.harness.report import (
    brief,
    decoders,
    export,
    figures,
    methods,
    overall,
    pairs,
    plots,
    predictions,
    rejections,
    tables,
    text,
    texts,
)
from dpft.harness.report.figures import Figures
from dpft.harness.report.reading import Curves, diagnostics, summaries
from dpft.harness.report.text import Part, latex
from dpft.harness.report.views import Group, View, arrange
from dpft.harness.runs.spec import completed

__all__ = ["Figures", "Options", "Report", "View", "latex", "markdown", "markers", "summaries", "theory", "write"]


@dataclass(frozen=True)
class Options:
    """What to print of finished runs.

    curves: under each table another one with the metric at the evaluations. rates: every learning rate of a grid, not only the
    best of each method. public: without diagnostics, which epsilon does not cover. view: what is held equal. baseline: the
    method that others are compared with, default dp-adam, else dp-sgd.
    """

    curves: bool = False
    rates: bool = False
    public: bool = False
    view: View = field(default_factory=View)
    baseline: str | None = None


class Report:
    """Records arranged in matched groups, ready to be printed in several forms. Raises BadInput for a damaged curve."""

    def __init__(self, records: list[dict[str, Any]], store: Store, options: Options):
        self.store, self.options = store, options
        records, self.twice = _once(records)
        wrong = rejections.rejected(records)
        self.records = [
            {**record, "spec": completed(record["spec"]), "rejected": wrong.get(record["run_id"])} for record in records
        ]
        done = [record for record in self.records if record["status"] == "done"]
        present = {record["spec"]["method"] for record in done}
        if options.baseline is not None and done and options.baseline not in present:
            raise unknown("method among these runs", options.baseline, present)
        self.curves = Curves(store, done)
        counted = [record for record in self.records if record["status"] != "skipped"]
        arranged = arrange(counted, options.view, self.curves, options.rates)
        self.groups: list[Group] = [group for group in arranged if group.rows]
        self.left_out = [line for group in arranged if not group.rows for line in group.left_out]

    def parts(self, pictures: Figures | None = None) -> Iterator[Part]:
        """Paragraphs and tables, one section per (task, model, head, epsilon), then what is not in a table and why."""
        if not self.records:
            yield "There are no runs yet; make some with `dpft run`."
        stems, compared = figures.stems(self.groups), False
        for group, stem in zip(self.groups, stems, strict=True):
            yield from tables.comparison(group, self.curves, self.options.public)
            differences = pairs.differences(group, self.curves, self.options.baseline)
            compared = compared or bool(differences)
            yield from differences
            yield from pairs.learning_rates(group)
            yield from pairs.pareto(group)
            yield from decoders.comparison(group, self.curves, self.store, self.options.public)
            yield from texts.comparison(group, self.options.public)
            if self.options.curves:
                yield from tables.curve_table(group, self.curves)
            if pictures is not None:
                yield from plots.of_group(group, stem, self.curves, self.store, pictures, self.options.public)
        yield from overall.summary(self.groups, pictures)
        if self.left_out:
            yield f"No table, as the view `{self.options.view.name}` admits no row: {'; '.join(self.left_out)}."
        if compared:
            yield pairs.READING
        lines = [
            f"- `{r['run_id']}` {r['spec']['task']}/{r['spec']['method']}: **{r['status']}**: {text.told(r['error'])}"
            for r in self.records
            if r["status"] != "done"
        ]
        lines += [
            f"- `{one}` and `{other}` are the same configuration and seed; delete one of them, and both count once."
            for one, other in self.twice
        ]
        if lines:
            yield "Not in a table:\n\n" + "\n".join(lines)

    def brief(self, pictures: Figures | None = None) -> list[Part]:
        """One screen: at most six columns, all budgets of a setting in one table, one picture each."""
        return list(brief.parts(self.groups, self.options.baseline, pictures))

    def overview(self) -> list[Part]:
        """One line a method: what trains, what is asked, what it costs, what was claimed and found."""
        return methods.overview(self.groups, self.options.baseline)

    def predictions(self) -> list[Part]:
        """What was predicted of these runs, and whether it held."""
        return predictions.answers(self.groups)

    def frame(self):
        """One row per run, as a polars.DataFrame; see `export.frame`."""
        return export.frame(self.records, self.groups, self.curves, self.options.public)

    def csv(self, path: Path) -> None:
        """One line per run, the groups' thresholds among them."""
        export.csv(self.records, self.groups, self.curves, self.options.public, path)


def _once(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """(records, pairs of run ids): each run once, and none of two files that are one configuration and seed."""
    by_spec: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        by_spec[json.dumps(completed(record["spec"]), sort_keys=True)][record["run_id"]] = record
    kept = [next(iter(found.values())) for found in by_spec.values() if len(found) == 1]
    return kept, [tuple(sorted(found))[:2] for found in by_spec.values() if len(found) > 1]


def markdown(
    records: list[dict[str, Any]], store: Store, figures: Figures | None = None, options: Options | None = None
) -> str:
    """All tables of `records` as markdown. figures: where pictures go and what they are called in the text."""
    return text.markdown(list(Report(records, store, options or Options()).parts(figures)))


def theory(store: Store, figures: Figures | None = None) -> list[Part]:
    """Spectra that theory predicts beside those that were seen, and a picture of the run with the largest budget."""
    records = [record for record in store.each() if record["status"] == "done"]
    done = [{**r, "spec": completed(r["spec"]), "diagnostics": diagnostics(store, r)} for r in records]
    parts = decoders.theory(done)
    if not parts:
        return ["There are no runs to compare with theory; make some with `dpft run spectral-theory`."]
    if figures is not None:
        largest = max(filter(decoders.in_theory, done), key=lambda r: r["spec"]["epsilon"])
        title, link = plots.spectra_of(largest, figures)
        parts.append(f"![{title}]({link})")
    return parts


def markers(section: str | None = None) -> tuple[str, str]:
    """The lines between which a section of a markdown file belongs to `dpft report`."""
    name = "dpft report" if section is None else f"dpft report {section}"
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write(text: str, path: Path, check: bool, markers: tuple[str, str]) -> bool:
    """Put `text` between the `markers` of `path`; with `check` only compare. Returns whether the file was up to date.

    Raises BadInput when the file has no markers or cannot be read or written.
    """
    opening, closing = markers
    old = read_text(path, "The file", f"make it with the lines {opening} and {closing}")
    before, begin, rest = old.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise BadInput(f"{path} lacks the lines {opening} and {closing}; add them where the tables belong.")
    new = f"{before}{opening}\n\n{text}\n\n{closing}{after}"
    if new != old and not check:
        with atomic(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return new == old

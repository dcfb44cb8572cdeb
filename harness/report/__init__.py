"""Records -> markdown and pictures. Rows are ranked only where their budgets match; otherwise the reason is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.report import decoders, plots, tables
from dpft.harness.report import rows as reading
from dpft.harness.report.plots import Figures
from dpft.harness.spec import completed
from dpft.harness.store import Store, atomic


def markers(section: str | None = None) -> tuple[str, str]:
    """The lines between which a section of a markdown file belongs to `dpft report`."""
    name = "dpft report" if section is None else f"dpft report {section}"
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def markdown(
    records: list[dict[str, Any]],
    store: Store,
    curves: bool = False,
    rates: bool = False,
    figures: Figures | None = None,
) -> str:
    """All tables of `records`, one per (task, model, head, epsilon), then what is not in a table and why.

    curves: under each table another one with the metric at the evaluations. rates: every learning rate of a grid, not only the
    best of each method. figures: where pictures go and what they are called in the text.
    """
    if not records:
        return "There are no runs yet; make some with `dpft run`."
    records = [{**r, "spec": completed(r["spec"])} for r in records]
    done = [r for r in records if r["status"] == "done"]
    parts = []
    for group in reading.groups(done):
        rows = reading.ordered(group if rates else reading.best_rates(group))
        parts.append(tables.comparison(rows, store))
        if (text := decoders.comparison(rows, store)) is not None:
            parts.append(text)
        if curves:
            parts.append(tables.curves(rows, store))
        if figures is not None:
            parts += plots.of_group(rows, store, figures)
    failed = [r for r in records if r["status"] != "done"]
    if failed:
        lines = [
            f"- `{r['run_id']}` {r['spec']['task']}/{r['spec']['method']}: **{r['status']}**: {r['error']}"
            for r in failed
        ]
        parts.append("Not in a table:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def theory(records: list[dict[str, Any]], figures: Figures | None = None) -> str:
    """Spectra that theory predicts beside those that were seen, and a picture of the run with the largest budget."""
    done = [{**r, "spec": completed(r["spec"])} for r in records if r["status"] == "done"]
    text = decoders.theory(done)
    if text is None:
        return "There are no runs to compare with theory; make some with `dpft run spectral-theory`."
    if figures is not None:
        text += "\n\n" + plots.spectra_of(
            max(filter(decoders.in_theory, done), key=lambda r: r["spec"]["epsilon"]), figures
        )
    return text


def write(text: str, path: Path, check: bool, markers: tuple[str, str]) -> bool:
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

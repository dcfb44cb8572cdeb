"""Records -> what the page embeds: an index of rows (all that the table, the filters and the matrix need) and runs in blocks.

Groups, rows, ranks and verdicts are those of the report (`harness/report`): nothing is ranked or averaged here.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from dpft.harness.records.store import Store
from dpft.harness.report import Options, Report, pairs
from dpft.harness.report import rows as making
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import certified, examples_of, spread
from dpft.harness.report.views import Group
from dpft.harness.runs.spec import completed

BLOCK = 64  # runs that are packed together, and unpacked together when one of them is looked at
POINTS = 120  # of one curve; evaluations always stay
CURVE = ("step", "epsilon", "metric")
DIAGNOSTIC_CURVE = ("loss", "alignment_noisy", "alignment_decoded", "clipped_fraction")
SUMMARIES = ("private", "alignment", "clipped_fraction")  # of the diagnostics; the rest is a row per matrix and step


class Builder:
    """Takes records one by one, gives packed blocks as they fill up, and the index at the end.

    What it keeps of a record is what ranking needs; a folder of any size is read once. public: without diagnostics, which are
    computed from clean gradients and training losses and are not covered by epsilon, and without texts (validation rows).
    """

    def __init__(self, store: Store, public: bool):
        self.store, self.public = store, public
        self.kept: list[dict[str, Any]] = []

    def blocks(self, records: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Base64 of the gzipped JSON of up to BLOCK runs."""
        block: list[dict[str, Any]] = []
        for record in records:
            block.append(self._run({**record, "spec": completed(record["spec"])}))
            self.kept.append(_slim(record, len(self.kept), block[-1]["curve"] is not None))
            if len(block) == BLOCK:
                yield packed(block)
                block = []
        if block:
            yield packed(block)

    def _run(self, record: dict[str, Any]) -> dict[str, Any]:
        diagnostics = record["diagnostics"] or {}
        shown = {key: diagnostics[key] for key in SUMMARIES if key in diagnostics}
        curve = None
        if record["status"] == "done" or self.store.has_curve(record["run_id"]):
            curve = _thinned(self.store.curve(record["run_id"]), self.columns)
        result = _measured(record) if self.public else record["result"]
        return {**record, "result": result, "diagnostics": None if self.public else shown, "curve": curve}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the curves that the page shows."""
        return CURVE if self.public else CURVE + DIAGNOSTIC_CURVE

    def index(self) -> dict[str, Any]:
        """Groups and rows in the order and with the ranks of the markdown report, then runs that are in no table."""
        report = Report(self.kept, self.store, Options(public=self.public))
        groups, rows, shown = [], {}, set()
        for number, group in enumerate(report.groups):
            verdicts = pairs.verdicts(group, None)
            groups.append(_group(group, verdicts))
            _add(rows, number, group, verdicts)
        for row in rows.values():
            shown |= set(row["ids"])
        found = [{key: value for key, value in row.items() if key != "row"} for row in rows.values()]
        found += [_alone(r, len(rows) + i) for i, r in enumerate(self.kept) if r["run_id"] not in shown]
        counted = {s: sum(r["status"] == s for r in self.kept) for s in sorted({r["status"] for r in self.kept})}
        return {
            "block": BLOCK,
            "summary": f"{len(self.kept):,} runs: "
            + (", ".join(f"{n:,} {s}" for s, n in counted.items()) or "none yet"),
            "columns": [key for key in self.columns if key not in ("step", "epsilon")],
            "groups": groups,
            "rows": found,
        }


def _add(rows: dict[tuple, dict], number: int, group: Group, verdicts: pairs.Verdicts | None) -> None:
    """Rows of one group; a control belongs to every group of its setting, and is one row.

    Of a method there is one row, at the best of its grid; its other learning rates are shown where a reader asks for them.
    """
    families = {id(row): i for i, grid in enumerate(making.alike(group.rows)) for row in grid}
    names = {_key(row): name for name, row in zip(making.names(group.every), group.every, strict=True)}
    taken, place = set(), {}
    for i, (row, name, rank) in enumerate(zip(group.rows, group.names, group.ranks, strict=True)):
        kept = families[id(row)] not in taken
        taken.add(families[id(row)])
        place[_key(row)] = (i, row, name, rank, kept)
    for row in group.every:
        other = (len(group.rows), row, names[_key(row)], None, False)  # a rate that is not its method's best
        i, shown, name, rank, kept = place.get(_key(row), other)
        entry = rows.setdefault(_key(row), _row(shown, len(rows)))
        entry["groups"].append(number)
        entry["in_epsilon"].append(_budget(group))
        if kept or not entry["kept"]:
            order = number * 1e6 + i + (0 if kept else 0.5)
            entry |= {"kept": kept, "rank": rank, "order": order, "name": name}
            entry |= {"verdict": _verdict(shown, name, group, verdicts), "tried": len(shown.grid) or 1}


def _key(row: Row) -> tuple:
    """Of a configuration: its first run, whichever of its seeds a table ranks on."""
    return tuple(sorted(r["run_id"] for r in row.whole.records))


def _verdict(row: Row, name: str, group: Group, verdicts: pairs.Verdicts | None) -> str:
    """What may be concluded of a row, or why nothing may."""
    if not row.competes:
        return "control"
    if not row.ranked:
        return f"not ranked: {'; '.join([*row.flaws, *([row.lacks] if row.lacks else [])])}"
    if group.reason is not None:
        return "not ranked"
    if all(row is not one for one in group.rows):
        return "another learning rate"
    if verdicts is None:
        return "not compared: no two seeds shared with a baseline"
    if name == verdicts.base:
        return "the baseline"
    if name not in verdicts.found:
        return "another learning rate" if row.baseline else "not compared: no two seeds shared with the baseline"
    one = verdicts.found[name]
    if one.verdict.startswith("cannot tell"):
        return f"{one.difference:+.4f}, {one.verdict}"
    return f"{one.verdict} ({one.difference:+.4f}, Holm's p {one.adjusted:.3g}, {len(one.seeds)} seeds)"


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


def _slim(record: dict[str, Any], position: int, curve: bool) -> dict[str, Any]:
    """What is kept of a record until the index is made: what the report reads of it, and where the page has it."""
    diagnostics = record["diagnostics"] or {}
    return {
        **{key: value for key, value in record.items() if key != "diagnostics"},
        "diagnostics": {key: diagnostics[key] for key in SUMMARIES if key in diagnostics},
        "result": _measured(record),
        "position": position,
        "curve": curve,
    }


def _measured(record: dict[str, Any]) -> dict[str, Any] | None:
    """The result without the texts beside it."""
    return record["result"] and {key: value for key, value in record["result"].items() if key != "samples"}


def _budget(group: Group) -> float | None:
    return group.private[0].spec["epsilon"] if group.private else None


def _group(group: Group, verdicts: pairs.Verdicts | None) -> dict[str, Any]:
    result = group.result
    lines = [making.over(group.seeds)] if group.seeds and group.reason is None else []
    if verdicts is not None:
        lines.append(f"Verdicts: against {verdicts.base}, paired by seed.")
    lines += group.notes
    return {
        "title": group.title.replace("`", ""),
        "epsilon": _budget(group),
        "reason": group.reason,
        "note": " ".join(lines) or None,
        "chance": result["chance"],
        "higher_is_better": result["higher_is_better"],
    }


def _row(row: Row, order: int) -> dict[str, Any]:
    records = row.whole.records
    result = records[0]["result"]
    known = [upper for r in records if (upper := certified(r)) is not None]
    return {
        **_common(records, order),
        "runs": row.runs,
        "metric": result["metric"],
        "final": row.final,
        "final_text": spread([r["result"]["final"] for r in row.records]),
        "certified": max(known) if known else None,
        "certified_text": f"{max(known):.3f}" if known else "not certified" if row.private else "∞",
        "in_epsilon": [],
        "step_s": row.step_s,
        "peak": row.peak_bytes,
    }


def _alone(record: dict[str, Any], order: int) -> dict[str, Any]:
    """A run that is in no table."""
    spec = completed(record["spec"])
    done = record["status"] == "done"
    return {
        **_common([{**record, "spec": spec}], 1e12 + order),
        "kept": True,
        "name": f"{_method(spec)} (lr={spec['lr']:g}, seed={spec['seed']})",
        "error": "The same configuration and seed as another run; delete one of them." if done else record["error"],
        "runs": "1/1" if done else "0/1",
        "metric": None,
        "final": None,
        "final_text": "–",
        "certified": None,
        "certified_text": "–",
        "step_s": None,
        "peak": None,
    }


def _method(spec: dict[str, Any]) -> str:
    return spec["method"] + (
        "" if spec["decoder"] == "mean" or spec["decoder"] in spec["method"] else f"+{spec['decoder']}"
    )


def _common(records: list[dict[str, Any]], order: float) -> dict[str, Any]:
    spec, first = records[0]["spec"], records[0]
    return {
        "order": order,
        "groups": [],
        "rank": None,
        "verdict": "",
        "tried": None,
        "kept": False,
        "name": spec["method"],
        "method": _method(spec),
        **{key: spec[key] for key in ("task", "model", "epsilon", "lr")},
        "examples": examples_of(spec),
        "settings": " ".join(f"{key}={value}" for key, value in (spec["task_options"] | spec["options"]).items()),
        "status": first["status"],
        "error": first["error"],
        "trainable": (first["cost"] or {}).get("trainable_parameters"),
        "ids": [r["run_id"] for r in records],
        "positions": [r["position"] for r in records],
        "seed_of": [r["spec"]["seed"] for r in records],
        "curve": any(r["curve"] for r in records),
    }

"""Records -> what the page embeds: an index of rows (all that the table, the filters and the matrix need) and runs in blocks."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from dpft.harness.report import rows as reading
from dpft.harness.report.rows import Row, name_of
from dpft.harness.report.tables import spread
from dpft.harness.spec import completed
from dpft.harness.store import Store

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
            record = {**record, "spec": completed(record["spec"])}
            block.append(self._run(record))
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
        if record["status"] == "done" or self.store.curve_path(record["run_id"]).exists():
            curve = _thinned(self.store.curve(record["run_id"]), self.columns)
        result = _measured(record) if self.public else record["result"]
        return {**record, "result": result, "diagnostics": None if self.public else shown, "curve": curve}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the curves that the page shows."""
        return CURVE if self.public else CURVE + DIAGNOSTIC_CURVE

    def index(self) -> dict[str, Any]:
        """Groups and rows in the order and with the ranks of the markdown report, then runs that are not done."""
        done = [r for r in self.kept if r["status"] == "done"]
        groups, rows = [], {}
        for number, group in enumerate(reading.groups(done)):
            best = reading.ordered(reading.best_rates(group))
            ranks, reason = reading.places(best)
            groups.append(_group(best, reason))
            self._add(rows, number, best, ranks, group)
        found = list(rows.values()) + [
            _failed(r, len(rows) + i) for i, r in enumerate(self.kept) if r["status"] != "done"
        ]
        counted = {s: sum(r["status"] == s for r in self.kept) for s in sorted({r["status"] for r in self.kept})}
        return {
            "block": BLOCK,
            "summary": f"{len(self.kept):,} runs: "
            + (", ".join(f"{n:,} {s}" for s, n in counted.items()) or "none yet"),
            "columns": [key for key in self.columns if key not in ("step", "epsilon")],
            "groups": groups,
            "rows": found,
        }

    @staticmethod
    def _add(rows: dict[int, dict], number: int, best: list[Row], ranks: list[int | None], group: list[Row]) -> None:
        """Rows of one group; a control belongs to every group of its setting, and is one row."""
        place = {id(row.records): (i, row, rank) for i, (row, rank) in enumerate(zip(best, ranks, strict=True))}
        for row in reading.ordered(group):
            i, named, rank = place.get(id(row.records), (len(best), row, None))
            entry = rows.setdefault(id(row.records), _row(row, len(rows)))
            entry["groups"].append(number)
            if id(row.records) in place:
                entry |= {"kept": True, "rank": rank, "order": number * 1e6 + i, "name": name_of(named, best)}
            elif not entry["kept"]:
                entry |= {"order": number * 1e6 + i, "name": name_of(row, group)}
            entry["in_epsilon"].append(_budget(group))


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
    """What is kept of a record until the index is made."""
    cost, privacy = record["cost"] or {}, record["privacy"]
    return {
        "position": position,
        "curve": curve,
        **{key: record[key] for key in ("run_id", "status", "spec", "error")},
        "privacy": privacy and {key: value for key, value in privacy.items() if key not in ("ledger", "cross_checks")},
        "result": _measured(record),
        "step_s": cost.get("step_s"),
        "peak": sum((cost.get("peak_bytes") or {}).values()) or None,
        "trainable": cost.get("trainable_parameters"),
    }


def _measured(record: dict[str, Any]) -> dict[str, Any] | None:
    """The result without the texts beside it."""
    return record["result"] and {key: value for key, value in record["result"].items() if key != "samples"}


def _budget(group: list[Row]) -> float | None:
    return next((row.spec["epsilon"] for row in group if row.private), None)


def _group(rows: list[Row], reason: str | None) -> dict[str, Any]:
    spec, result, epsilon = rows[0].spec, rows[0].records[0]["result"], _budget(rows)
    title = f"{spec['task']} (v{spec['task_version']}), {spec['model']}, head {spec['head']}"
    return {
        "title": title + ("" if epsilon is None else f", ε ≤ {epsilon:g}"),
        "epsilon": epsilon,
        "reason": reason,
        "chance": result["chance"],
        "higher_is_better": result["higher_is_better"],
    }


def _row(row: Row, order: int) -> dict[str, Any]:
    records = row.records
    result = records[0]["result"]
    known = [r["privacy"]["epsilon"][2] for r in records if r["privacy"] and r["privacy"]["epsilon"]]
    return {
        **_common(records, order),
        "metric": result["metric"],
        "final": row.final,
        "final_text": spread([r["result"]["final"] for r in records]),
        "certified": max(known) if known else None,
        "certified_text": f"{max(known):.3f}" if known else "not certified" if row.private else "∞",
        "in_epsilon": [],
    }


def _failed(record: dict[str, Any], order: int) -> dict[str, Any]:
    spec = record["spec"]
    common = _common([record], 1e12 + order)
    return {
        **common,
        "kept": True,
        "name": f"{common['method']} (lr={spec['lr']:g}, seed={spec['seed']})",
        "metric": None,
        "final": None,
        "final_text": "–",
        "certified": None,
        "certified_text": "–",
    }


def _common(records: list[dict[str, Any]], order: float) -> dict[str, Any]:
    spec, first = records[0]["spec"], records[0]
    decoder = "" if spec["decoder"] == "mean" or spec["decoder"] in spec["method"] else f"+{spec['decoder']}"
    steps = [r["step_s"] for r in records if r["step_s"] is not None]
    return {
        "order": order,
        "groups": [],
        "rank": None,
        "kept": False,
        "name": spec["method"],
        "method": spec["method"] + decoder,
        **{key: spec[key] for key in ("task", "model", "epsilon", "lr")},
        "settings": " ".join(f"{key}={value}" for key, value in (spec["task_options"] | spec["options"]).items()),
        "status": first["status"],
        "error": first["error"],
        "seeds": len(records),
        "step_s": sorted(steps)[len(steps) // 2] if steps else None,
        "peak": max((r["peak"] for r in records if r["peak"]), default=None),
        "trainable": first["trainable"],
        "ids": [r["run_id"] for r in records],
        "runs": [r["position"] for r in records],
        "seed_of": [r["spec"]["seed"] for r in records],
        "curve": any(r["curve"] for r in records),
    }

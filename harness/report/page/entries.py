"""Rows of the report -> the lines of the page's table: one a method, its other learning rates behind it."""

from __future__ import annotations

from typing import Any

from dpft.harness.report import pairs
from dpft.harness.report import rows as making
from dpft.harness.report.labels import labels
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import certified, examples_of, spread
from dpft.harness.report.text import plain
from dpft.harness.report.views import Group
from dpft.harness.runs.spec import completed

Entries = dict[tuple, dict[str, Any]]  # configuration -> line, in the order of their numbers


def add(entries: Entries, number: int, group: Group, verdicts: pairs.Verdicts | None) -> dict[str, dict[str, Any]]:
    """Add the lines of a group; gives the line of each name of `group.names` that has the best rate of its method.

    A control belongs to every group of its setting, and is one line.
    """
    families = {_key(row): _key(grid[0]) for grid in making.alike(group.every) for row in grid}
    names = {_key(row): name for name, row in zip(making.names(group.every), group.every, strict=True)}
    taken, place = set(), {}
    for i, (row, name, rank) in enumerate(zip(group.rows, group.names, group.ranks, strict=True)):
        family = families[_key(row)]
        place[_key(row)] = (i, row, name, rank, family not in taken)
        taken.add(family)
    best = [(row, name) for _, row, name, _, kept in place.values() if kept]
    short = dict(zip((name for _, name in best), labels(*zip(*best, strict=True)), strict=True))
    found = {}
    for row in group.every:
        other = (len(group.rows), row, names[_key(row)], None, False)  # a rate that is not its method's best
        i, shown, name, rank, kept = place.get(_key(row), other)
        entry = entries.setdefault(_key(row), _row(shown, len(entries)))
        entry["groups"].append(number)
        entry["in_epsilon"].append(budget(group))
        if kept or not entry["kept"]:
            order = number * 1e6 + i + (0 if kept else 0.5)
            label = plain(short[name]) if kept else f"lr {row.spec['lr']:g}"
            entry |= {"kept": kept, "rank": rank, "order": order, "name": plain(name), "label": label}
            entry |= {"verdict": _verdict(shown, name, kept, group, verdicts), "tried": len(shown.grid) or 1}
        if kept:
            found[name] = entry
    for row in group.every:
        entries[_key(row)]["family"] = entries[families[_key(row)]]["number"]
    return found


def budget(group: Group) -> float | None:
    """Epsilon of the group; None where nothing in it is private."""
    return group.private[0].spec["epsilon"] if group.private else None


def alone(record: dict[str, Any], number: int) -> dict[str, Any]:
    """The line of a run that is in no table."""
    spec = completed(record["spec"])
    done = record["status"] == "done"
    name = f"{_method(spec)} (lr={spec['lr']:g}, seed={spec['seed']})"
    return {
        **_common([{**record, "spec": spec}], number),
        "order": 1e12 + number,
        "family": number,
        "kept": True,
        "name": name,
        "label": name,
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


def _key(row: Row) -> tuple:
    """Of a configuration: its runs, whichever of its seeds a table ranks on."""
    return tuple(sorted(r["run_id"] for r in row.whole.records))


def _verdict(row: Row, name: str, kept: bool, group: Group, verdicts: pairs.Verdicts | None) -> str:
    """What may be concluded of a row, or why nothing may. kept: it has the best rate of its method."""
    if not row.competes:
        return "control"
    if not row.ranked:
        return f"not ranked: {'; '.join([*row.flaws, *([row.lacks] if row.lacks else [])])}"
    if group.reason is not None:
        return "not ranked"
    if not kept:
        return "another learning rate"
    if verdicts is None:
        return "not compared: no two seeds shared with a baseline"
    if name == verdicts.base:
        return "the baseline"
    if name not in verdicts.found:
        return "not compared: no two seeds shared with the baseline"
    one = verdicts.found[name]
    if one.verdict.startswith("cannot tell"):
        return f"{one.verdict} ({one.difference:+.4f})"
    kind = "Holm's" if verdicts.chosen_of == 1 else "adjusted"
    return f"{one.verdict} ({one.difference:+.4f}, {kind} p {one.adjusted:.3g}, {len(one.seeds)} seeds)"


def _row(row: Row, number: int) -> dict[str, Any]:
    records = row.whole.records
    known = [upper for r in records if (upper := certified(r)) is not None]
    return {
        **_common(records, number),
        "control": not row.competes,
        "runs": row.runs,
        "metric": records[0]["result"]["metric"],
        "final": row.final,
        "final_text": spread([r["result"]["final"] for r in row.records]),
        "finals": [r["result"]["final"] for r in records],
        "certified": max(known) if known else None,
        "certified_text": f"{max(known):.3f}" if known else "not certified" if row.private else "∞",
        "in_epsilon": [],
        "step_s": row.step_s,
        "peak": row.peak_bytes,
    }


def _common(records: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """number: the place of the line among all of the index."""
    spec, first = records[0]["spec"], records[0]
    return {
        "number": number,
        "groups": [],
        "rank": None,
        "verdict": "",
        "tried": None,
        "kept": False,
        "method": _method(spec),
        **{key: spec[key] for key in ("task", "model", "epsilon", "lr")},
        "split": spec["split"],
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


def _method(spec: dict[str, Any]) -> str:
    decoder = spec["decoder"]
    return spec["method"] + ("" if decoder == "mean" or decoder in spec["method"] else f"+{decoder}")

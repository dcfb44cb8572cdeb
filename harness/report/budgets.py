"""How the runs of a table divide their budget among the releases of a step, where they make more than one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpft.harness.privacy.shares import described, of_releases
from dpft.harness.report.rows import Row


def line(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """One sentence about the rows whose runs release more than one thing, None where there are none; names: of the rows."""
    said: dict[str, list[str]] = {}
    for row, name in zip(rows, names, strict=True):
        text = next((text for record in row.records if (text := _shares(record)) is not None), None)
        if text is not None:
            said.setdefault(text, []).append(name)
    if not said:
        return None
    parts = [f"{', '.join(names)}: {text}" for text, names in said.items()]
    return f"Releases of a step, each with its part of the budget: {'. '.join(parts)}."


def _shares(record: dict[str, Any]) -> str | None:
    privacy = record["privacy"]
    if not privacy or record.get("rejected"):
        return None
    events = privacy["ledger"]
    if len({release["name"] for event in events for release in event["releases"]}) < 2:
        return None
    return described((event["step_to"] - event["step_from"], of_releases(event["releases"])) for event in events)

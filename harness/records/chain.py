"""A hash chain over what a run saw: its booked events, curve rows and releases, from its spec to its result. Needs no torch.

    value_0 = H(spec, fingerprints of data and model)
    value_t = H(value_{t-1}, event of step t, curve row of step t with the digest of its release)
    value   = H(value_T, result)

H is SHA-256 of canonical JSON. A chain proves nothing against an author who makes it anew; it ties the parts of one record
together, and `dpft run --replay` finds the step at which a claimed run and a real one part.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpft.harness.runs.spec import RunSpec, completed

VERSION = 1
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def start(spec: RunSpec, data_fingerprint: str | None, model_fingerprint: str | None) -> str:
    """The value before the first step, 64 hex digits."""
    return _hash("start", VERSION, spec.canonical(), data_fingerprint, model_fingerprint)


def extended(value: str, event: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    """The value after one more step: `event` as `booked` gives it (None: not private), `row` of the curve."""
    return _hash("step", value, event, _plain(row))


def closed(value: str, result: Mapping[str, Any] | None) -> str:
    """The value that the record holds."""
    return _hash("end", value, result)


def booked(events: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any] | None:
    """The event of one step (from 0) out of a run-length encoded ledger's; None: not booked. As `Ledger.booked`."""
    at = bisect_right(events, step, key=lambda event: event["step_from"]) - 1
    if at < 0 or step >= events[at]["step_to"]:
        return None
    return {**events[at], "step_from": step, "step_to": step + 1}


def values(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The values of a record and its curve: before the first step, after each, and closed. As the run itself made them."""
    provenance, privacy = record["provenance"], record["privacy"]
    spec = RunSpec(**completed(record["spec"]))
    value = start(spec, provenance["data_fingerprint"], provenance["model_fingerprint"])
    yield value
    for step, row in enumerate(rows):
        value = extended(value, None if privacy is None else booked(privacy["ledger"], step), row)
        yield value
    yield closed(value, record["result"])


def is_needed(record: Mapping[str, Any]) -> bool:
    """Whether a record without a chain is incomplete: it is of a private run that is newer than the chain."""
    return record["privacy"] is not None and record["spec"].get("noise_stream", 1) != 1


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says, whatever file it has been through: no nulls, and every number but the step a float."""
    found = {key: value for key, value in row.items() if value is not None}
    return {key: value if key == "step" or isinstance(value, str) else float(value) for key, value in found.items()}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(_CANONICAL(parts).encode()).hexdigest()

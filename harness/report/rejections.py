"""What `dpft verify` would say of records before they are ranked: recomputed once, kept on disk by the records' digests."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpft.harness import privacy
from dpft.harness.cache import cached
from dpft.harness.privacy.claims_alike import Claims
from dpft.harness.runs.spec import RunSpec, completed
from dpft.harness.statistics import thresholds


def rejected(records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Run id -> what is wrong with the record of a finished run, one sentence each; runs that verify are left out.

    Curves are not read, so what contradicts them is for `dpft verify` to find. Records are looked up together where they share a
    ledger: the accountants are asked once for each ledger, and not again while these records stay the same.
    """
    alike: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["status"] == "done":
            alike[_ledger(record)].append(record)
    found: dict[str, list[str]] = {}
    claims = Claims()
    for ledger, group in alike.items():
        inputs = {"code": _code(), "ledger": ledger, "records": [_digest(record) for record in group]}
        count = len(group)
        findings = cached(
            "verified",
            inputs,
            lambda value, count=count: _valid(value, count),
            lambda group=group: [_findings(r, claims) for r in group],
        )
        found |= {record["run_id"]: said for record, said in zip(group, findings, strict=True) if said}
    return found


def _findings(record: dict[str, Any], claims: Claims) -> list[str]:
    try:
        expected = RunSpec(**completed(record["spec"])).run_id
    except (TypeError, ValueError) as problem:
        return [f"The spec is not that of a run ({problem})."]
    if expected != record["run_id"]:
        return [f"The spec is that of run {expected}, not of {record['run_id']}."]
    return claims.findings(record)


def _valid(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(said, list) for said in value)


def _ledger(record: dict[str, Any]) -> str:
    section = record["privacy"]
    kept = {key: section.get(key) for key in ("ledger", "delta", "target")} if isinstance(section, dict) else section
    return hashlib.sha256(_text(kept)).hexdigest()


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(_text({key: value for key, value in record.items() if key != "diagnostics"})).hexdigest()


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@functools.cache
def _code() -> str:
    """The digest of the code that verifies: what another version found is not kept."""
    files = [Path(thresholds.__file__), *sorted(Path(privacy.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

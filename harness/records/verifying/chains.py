"""The hash chain of a record, made again from its spec, fingerprints, ledger, curve and result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpft.harness.records import chain
from dpft.harness.records.verifying.curves import Rows
from dpft.harness.records.verifying.layout import RELEASE


def findings(record: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Of a run that is done."""
    private = record["privacy"] is not None
    released = [row.get("release") for row in rows]
    held = record.get("chain")
    if held is None:
        if chain.is_needed(record):
            yield "The record has no chain, which runs of its kind have."
        elif any(one is not None for one in released):
            yield "The curve has digests of releases, but the record has no chain."
        return
    if not isinstance(held, dict) or held.get("version") != chain.VERSION:
        yield f"The chain must be of version {chain.VERSION}, not {held!r}."
        return
    if not all(map(RELEASE, released) if private else (one is None for one in released)):
        yield f"The curve must have the digest of {'every release' if private else 'no release: nothing was released'}."
        return
    *_, value = chain.values(record, rows)
    if held.get("value") != value:
        yield (
            f"The chain ends at {str(held.get('value'))[:16]}, but spec, fingerprints, ledger, curve and result give "
            f"{value[:16]}: one of them is not what the run saw."
        )


def notices(record: dict[str, Any]) -> Iterator[str]:
    """What a record without a chain cannot show."""
    if record["status"] == "done" and record.get("chain") is None:
        yield "it has no chain, so nothing ties its curve and result to its releases"

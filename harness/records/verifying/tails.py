"""What a reader should know of the noise of a record: of old streams, whose tail ends early, and of releases that were lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpft.harness.privacy.tail import LEGACY_REACH, shortfall


def notices(record: dict[str, Any]) -> Iterator[str]:
    """Ends of sentences."""
    privacy = record["privacy"]
    if privacy is None:
        return
    if privacy.get("steps_lost"):
        yield f"{privacy['steps_lost']} of its {privacy['steps_run']} releases were lost with processes that were killed"
    if privacy.get("noise_stream", 1) == 1:
        yield _old(record, privacy)


def _old(record: dict[str, Any], privacy: dict[str, Any]) -> str:
    if privacy.get("mechanism", "gaussian") != "gaussian":
        return "its noise is of stream 1, drawn in fp32: what its tail lacks is not in its delta"
    device = str(record["provenance"].get("hardware", {}).get("device", "cpu")).partition(":")[0]
    reach = LEGACY_REACH.get(device, LEGACY_REACH["cpu"])
    dimension = record["cost"]["trainable_parameters"]
    alone, worst = (shortfall(privacy["ledger"], reach, d) for d in (None, dimension))
    return (
        f"its noise is of stream 1 and ends at {reach:.2f} sigma, so at any epsilon its delta is at least {worst:.2g}, "
        f"{worst / privacy['delta']:.2g} times what it says ({alone:.2g} where an example moves one coordinate)"
    )

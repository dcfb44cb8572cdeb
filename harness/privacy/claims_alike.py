"""Many records verified: what equal claims rest on is recomputed once. Seeds and rates of one method spend alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from dpft.harness.privacy.recompute import verify_record

WHOLE = ("schema", "status", "privacy")  # sections that are verified as they are
# of others: these entries; of further ones, only that they are there
PARTS = {"result": ("steps_to_threshold",), "provenance": ("settings",)}
FREE = ("lr", "seed")  # of the spec


class Claims:
    """Gives what `verify_record` does. It shows it only the parts of a record that it remembers findings by, so that nothing
    else can matter."""

    def __init__(self) -> None:
        self._found: dict[bytes, list[str]] = {}

    def findings(
        self, record: Any, curve_steps: int | None = None, curve_epsilon: Sequence[float] | None = None
    ) -> list[str]:
        """As `verify_record`."""
        claims = _claims(record) if isinstance(record, dict) else record
        try:
            text = repr((claims, curve_steps, curve_epsilon))
        except ValueError:  # a whole number of thousands of digits
            return verify_record(claims, curve_steps, curve_epsilon)
        key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        if key not in self._found:
            self._found[key] = verify_record(claims, curve_steps, curve_epsilon)
        return list(self._found[key])


def _claims(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key in WHOLE else _part(key, value) for key, value in record.items()}


def _part(section: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value if section in (*PARTS, "spec") else None
    if section == "spec":
        return {key: entry for key, entry in value.items() if key not in FREE}
    return {key: value[key] for key in PARTS.get(section, ()) if key in value}

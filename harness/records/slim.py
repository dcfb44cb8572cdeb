"""Records without their bulk: all that plans, tables and pages need, at a fraction of the time and memory of whole ones."""

from __future__ import annotations

from typing import Any

import msgspec

HELD_ONCE = 64  # bytes of JSON from which equal values of many records are held once


class _Summary(msgspec.Struct):
    """The diagnostics that a table needs; the others, a row per matrix and step, are skipped by the parser."""

    private: Any = None
    alignment: Any = None
    clipped_fraction: Any = None


class _Slim(msgspec.Struct, omit_defaults=True):
    """A record, as harness/records/schema.py knows it."""

    schema: Any = msgspec.UNSET
    run_id: Any = msgspec.UNSET
    status: Any = msgspec.UNSET
    spec: dict[str, msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    privacy: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: dict[str, msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    cost: dict[str, msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    diagnostics: _Summary | msgspec.UnsetType | None = msgspec.UNSET
    provenance: dict[str, msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    chain: Any = msgspec.UNSET
    error: Any = msgspec.UNSET


class Reader:
    """Reads many records; what they have in common word for word (budgets, machines, versions) is one object, to be read only."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Slim)
        self._held: dict[bytes, Any] = {}

    def record(self, text: bytes) -> dict[str, Any] | None:
        """The record without its bulk, its sections unchecked; None where `text` is none, and the whole of it says why."""
        try:
            slim = self._decoder.decode(text)
            record = {
                key: value for key in _Slim.__struct_fields__ if (value := getattr(slim, key)) is not msgspec.UNSET
            }
            if isinstance(slim.diagnostics, _Summary):
                record["diagnostics"] = msgspec.structs.asdict(slim.diagnostics)
            if isinstance(slim.privacy, msgspec.Raw):
                record["privacy"] = self._once(slim.privacy)
            for section in ("result", "cost", "provenance"):
                if isinstance(raw := record.get(section), dict):
                    record[section] = {key: self._once(value) for key, value in raw.items()}
            if isinstance(slim.spec, dict):
                record["spec"] = {key: self._once(value, least=0) for key, value in slim.spec.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return record

    def _once(self, raw: msgspec.Raw, least: int = HELD_ONCE) -> Any:
        if len(raw) < least:
            return msgspec.json.decode(raw)
        text = bytes(raw)
        if text not in self._held:
            self._held[text] = msgspec.json.decode(text)
        return self._held[text]

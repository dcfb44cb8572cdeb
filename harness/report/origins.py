"""What the runs of one table were made from: data, pretrained weights, stream of noise, torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dpft.harness.report.text import told

FINGERPRINTS = {"data_fingerprint": "data", "model_fingerprint": "pretrained weights"}
Records = Sequence[dict[str, Any]]


def noise_stream(spec: dict[str, Any]) -> int:
    """The version of the noise stream; 1 where the spec is older than its versions."""
    return spec.get("noise_stream", 1)


def sampler(spec: dict[str, Any]) -> str:
    """How batches were drawn; Poisson where the spec is older than others."""
    return spec.get("sampler", "poisson")


def unit(spec: dict[str, Any]) -> str:
    """Whose contribution the budget covers; an example's where the spec is older than users."""
    return spec.get("unit", "example")


def difference(records: Records, names: Sequence[str]) -> str | None:
    """One sentence where private runs cannot be ranked together, as they saw other data, weights or noise; else None."""
    first: dict[str, tuple[str, Any]] = {}  # what -> (name, value) of the first run that says
    for record, name in zip(records, names, strict=True):
        for what, value in _made_from(record).items():
            other, seen = first.setdefault(what, (name, value))
            if seen != value:
                return f"{other} and {name} differ in their {what}: {seen} against {value}."
    return None


def _made_from(record: dict[str, Any]) -> dict[str, Any]:
    found = {"noise stream": noise_stream(record["spec"])}
    for key, what in FINGERPRINTS.items():
        value = (record["provenance"] or {}).get(key)
        if value is not None:
            found[what] = str(value)[:12]
    return found


def notes(records: Records, names: Sequence[str], private: Sequence[bool]) -> list[str]:
    """What a reader should know: unknown fingerprints, controls on other data or weights, several versions of torch."""
    found = []
    for key, what in FINGERPRINTS.items():
        unknown = _unique(n for r, n in zip(records, names, strict=True) if (r["provenance"] or {}).get(key) is None)
        if unknown:
            found.append(f"Fingerprint of the {what} unknown, so not compared: {_some(unknown)}.")
        known = {(r["provenance"] or {}).get(key) for r, p in zip(records, private, strict=True) if p} - {None}
        other = _unique(
            n
            for r, n, p in zip(records, names, private, strict=True)
            if not p and known and (r["provenance"] or {}).get(key) not in known | {None}
        )
        if other:
            found.append(f"Not on the {what} of the other rows: {_some(other)}.")
    by_torch = defaultdict(list)
    for record, name in zip(records, names, strict=True):
        version = ((record["provenance"] or {}).get("versions") or {}).get("torch") or "unknown"
        by_torch[told(version)].append(name)
    if len(by_torch) > 1:
        versions = "; ".join(f"{version}: {_some(_unique(rows))}" for version, rows in sorted(by_torch.items()))
        found.append(f"Made with different versions of torch, which may differ by rounding: {versions}.")
    return found


def _unique(names) -> list[str]:
    return list(dict.fromkeys(names))


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""The ledger's releases against what the method of that version and the clipping rule declare: names, and shares of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.shares import noise_multipliers
from dpft.harness.records.verifying.asked import Asked
from dpft.harness.runs import registry
from dpft.harness.runs.releases import Schedule, schedule

REL = 1e-9


def findings(record: dict[str, Any], asked: Asked) -> Iterator[str]:
    """Of a private run that is done and has a row for every step; nothing where its method is not known."""
    privacy, spec = record["privacy"], asked.spec
    if privacy is None or asked.method is None or spec.decoder not in registry.decoders():
        return
    try:
        method = registry.instance(spec)
        expected = schedule(method, method.rule, spec.steps)
    except BadInput as problem:
        yield f"The releases of the run cannot be told: {problem}"
        return
    sigma = privacy["noise_multiplier"]
    if sigma is None:
        yield "noise_multiplier is null, but all steps of a run have one."
        return
    pick = _any if privacy.get("steps_lost") else _differing
    found = pick(privacy["ledger"], expected, sigma)
    if found is not None:
        step, made, wanted = found
        yield (
            f"Step {step} of the ledger releases {_said(made)}, but {spec.method} version {spec.method_version} declares "
            f"{_said(wanted)} (noise multipliers)."
        )


Found = tuple[int, Mapping[str, float], Mapping[str, float]]


def _differing(events: Sequence[Mapping[str, Any]], expected: Schedule, sigma: float) -> Found | None:
    """(step, noise multipliers that the ledger has, those that are declared) of the first step at which these differ."""
    place = 0
    for first, last, shares in expected:
        wanted = noise_multipliers(sigma, shares)
        while place < len(events) and events[place]["step_from"] < last:
            made = _made(events[place])
            if not _same(made, wanted):
                return max(first, events[place]["step_from"]), made, wanted
            if events[place]["step_to"] > last:
                break  # it goes on in the next stretch
            place += 1
    return None


def _any(events: Sequence[Mapping[str, Any]], expected: Schedule, sigma: float) -> Found | None:
    """Of a run that lost releases with killed processes: every event must be that of some step, the ledger counts on."""
    every = [noise_multipliers(sigma, shares) for _, _, shares in expected]
    for event in events:
        made = _made(event)
        if not any(_same(made, wanted) for wanted in every):
            return event["step_from"], made, every[0]
    return None


def _made(event: Mapping[str, Any]) -> dict[str, float]:
    return {release["name"]: release["noise_multiplier"] for release in event["releases"]}


def _same(made: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return made.keys() == wanted.keys() and all(math.isclose(made[k], wanted[k], rel_tol=REL) for k in made)


def _said(multipliers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in multipliers.items())

"""The spec against its id, against itself, and against the task, method and decoder of its versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import check, check_bands
from dpft.harness.runs.spec import RunSpec, completed, typed, types


@dataclass(frozen=True)
class Asked:
    """spec: the run, None where there is none; task, method: their classes, None where they are unknown or of other versions.

    findings: what is wrong; notices: what could not be checked.
    """

    spec: RunSpec | None = None
    task: type | None = None
    method: type | None = None
    findings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read(record: dict[str, Any]) -> Asked:
    """The spec of a record, whatever it holds."""
    try:
        spec = RunSpec(**completed(record["spec"]))
        expected = spec.run_id
    except (TypeError, ValueError) as problem:
        return Asked(findings=[f"The spec is not that of a run ({problem})."])
    found = list(_types(spec))
    if expected != record["run_id"]:
        found.append(f"The spec is that of run {expected}, not of {record['run_id']}.")
    if found:
        return Asked(findings=found)
    alike = spec.setting()  # of neither does anything else depend
    registered = tuple(
        id(known()) for known in (registry.tasks, registry.methods, registry.decoders, registry.clippings)
    )
    registered += tuple(
        getattr(known().get(name), "version", 0)
        for known, name in (
            (registry.tasks, spec.task),
            (registry.methods, spec.method),
            (registry.decoders, spec.decoder),
        )
    )
    task, method, wrong, notices = _of_settings(alike, registered)
    return Asked(spec, task, method, list(wrong), list(notices))


@lru_cache(maxsize=1024)
def _of_settings(canonical: str, registered: tuple[int, ...]) -> tuple[type | None, type | None, list[str], list[str]]:
    """(task, method, findings, notices) of a spec whose fields have the right types, for all seeds and rates at once."""
    spec, found, notices = RunSpec(**completed(json.loads(canonical))), [], []
    kinds = {kind: _kind(kind, spec, notices) for kind in ("task", "method", "decoder")}
    rule = registry.clippings().get(spec.clipping)
    if rule is None:
        notices.append(f"clipping {spec.clipping} is not known here, so what depends on it was not checked")
    try:
        check(spec)
        if kinds["task"] is not None:
            kinds["task"](spec.task_options).validate()
    except BadInput as problem:
        found.append(f"The spec cannot be run: {problem}")
    if not found and kinds["method"] is not None:
        found += _of_method(spec, kinds["method"], kinds["decoder"], rule)
    return kinds["task"], kinds["method"], found, notices


def _types(spec: RunSpec) -> Iterator[str]:
    for key in types():
        value = getattr(spec, key)
        if key in ("options", "task_options"):
            if not isinstance(value, dict):
                yield f"{key} in the spec must be an object, not {value!r}."
            continue
        plain = value is None or type(value) in (bool, int, float, str)
        if not (_is_kept if plain else _is_kept.__wrapped__)(key, type(value), value):
            yield f"{key} in the spec cannot be {value!r}."


@lru_cache(maxsize=4096)
def _is_kept(key: str, kind: type, value: Any) -> bool:
    """Whether a spec that is given `value` holds just that. kind: its type, as 1 and 1.0 and True are one key."""
    try:
        kept = typed(key, value)
    except BadInput:
        return False
    return type(kept) is kind and kept == value


def _kind(kind: str, spec: RunSpec, notices: list[str]) -> type | None:
    """The task, method or decoder of a spec, where this dpft has that version of it."""
    name, version = getattr(spec, kind), getattr(spec, f"{kind}_version")
    known = getattr(registry, f"{kind}s")().get(name)
    if known is None:
        notices.append(f"{kind} {name} is not known here, so what depends on it was not checked")
    elif known.version != version:
        notices.append(f"it has version {version} of {kind} {name}, this dpft {known.version}")
        return None
    return known


def _of_method(spec: RunSpec, method: type, decoder: type | None, rule: type | None) -> Iterator[str]:
    private = spec.epsilon is not None
    if private != method.private:
        yield f"{spec.method} is {'' if method.private else 'not '}private, but the spec has epsilon {spec.epsilon!r}."
    elif private != (spec.clip_norm is not None):
        yield f"A run with epsilon {spec.epsilon!r} cannot have clip_norm {spec.clip_norm!r}."
    if decoder is None or rule is None:
        return
    try:
        known = registry.defaults_of(method, decoder, rule)
        for key, value in spec.options.items():
            if key not in known:
                yield f"{spec.method} has no option {key!r}."
                return
            if type(value) is not type(known[key]) or value == known[key]:
                yield f"The option {key} of {spec.method} cannot be recorded as {value!r}."
                return
        made = registry.make(spec.method, spec.decoder, spec.options, spec.clipping)
        made.validate(spec)
        made.rule.validate(spec, made.asks)
        check_bands(spec)
    except BadInput as problem:
        yield f"The spec cannot be run: {problem}"
    except Exception as problem:
        yield f"The options of {spec.method} cannot be {spec.options!r} ({type(problem).__name__})."

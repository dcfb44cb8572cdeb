"""What there is: methods, tasks and suites, for `dpft list` and `dpft describe`."""

from __future__ import annotations

from typing import Any

from dpft.harness import registry, spec
from dpft.harness.errors import unknown


def listing(kind: str) -> list[dict[str, Any]]:
    """One row per method, task or suite."""
    if kind == "methods":
        return [
            {"name": name, "reference": m.reference, "private": m.private, "summary": m.summary}
            for name, m in registry.methods().items()
        ]
    if kind == "tasks":
        return [
            {"name": name, "kind": t.kind, "metric": t.metric, "data": t.hub or "package", "description": t.description}
            for name, t in registry.tasks().items()
        ]
    return [
        {"name": n, "runs": len(spec.load_suite(n).runs), "description": s.get("description", "")}
        for n, s in spec.suites().items()
    ]


def description(name: str) -> dict[str, Any]:
    """All there is to say of the method, task or suite called `name`. Raises BadInput with the nearest match."""
    if name in registry.methods():
        m = registry.methods()[name]
        releases = "one Gaussian release per step: the sum of clipped per-example gradients, L2 sensitivity clip_norm"
        return {
            "method": name,
            "version": m.version,
            "summary": m.summary,
            "about": " ".join((m.__doc__ or "").split()),
            "reference": m.reference or "none",
            "releases": releases if m.private else "everything: not private",
            "ranked": m.private and not m.control,
            "defaults": m.defaults,
            "options": m.options,
        }
    if name in registry.tasks():
        t = registry.tasks()[name]
        keys = ("version", "kind", "description", "source", "metric", "higher_is_better", "chance", "threshold")
        return {"task": name, **{key: getattr(t, key) for key in keys}, "hub": t.hub or "none: comes from a package"}
    if name in spec.suites():
        suite = spec.load_suite(name)
        return {
            "suite": name,
            "description": suite.description,
            "runs": [f"{s.run_id} {s.label()}" for s in suite.runs],
        }
    raise unknown("method, task or suite", name, [*registry.methods(), *registry.tasks(), *spec.suites()])

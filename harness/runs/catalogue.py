"""What there is: methods, decoders, clipping rules, tasks and suites, for `dpft list` and `dpft describe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import BadInput, CannotRun, unknown
from dpft.harness.leaderboard import board, space
from dpft.harness.runs import registry, suites
from dpft.harness.runs.resolve import of_task_option
from dpft.tasks import example

if TYPE_CHECKING:
    from dpft.methods.clipping.base import ClippingRule
    from dpft.tasks.base import Task


def listing(kind: str) -> list[dict[str, Any]]:
    """One row per method, decoder, clipping rule, task or suite."""
    if kind == "methods":
        return [
            {"name": name, "reference": m.reference, "private": m.private, "summary": m.summary}
            for name, m in registry.methods().items()
        ]
    if kind == "decoders":
        return [
            {"name": name, "reference": d.reference, "summary": d.summary} for name, d in registry.decoders().items()
        ]
    if kind == "clippings":
        return [
            {"name": name, "reference": r.reference, "adaptive": r.adaptive, "summary": r.summary}
            for name, r in registry.clippings().items()
        ]
    if kind == "tasks":
        return [
            {"name": name, "kind": t.kind, "metric": t.metric, "data": _data(t), "description": t.description}
            for name, t in registry.tasks().items()
        ]
    if kind == "boards":
        return [{"name": n, "description": one.description} for n, one in board.boards().items()]
    return [
        {"name": n, "runs": len(suites.load_suite(n).runs), "description": s.description}
        for n, s in suites.suites().items()
    ]


def trouble(kind: str) -> list[str]:
    """What a listing leaves out and why, a sentence each: entry points of installed packages that cannot be used."""
    kinds = {"methods": "method", "decoders": "decoder", "clippings": "clipping rule", "tasks": "task"}
    return registry.set_aside(kinds[kind]) if kind in kinds else []


def description(name: str, given: dict[str, Any] | None = None, data_dir: Path | None = None) -> dict[str, Any]:
    """All there is to say of what is called `name`, of any kind.

    given: options of a task, whose data in `data_dir` are then looked at, too. Raises BadInput with the nearest match, for
    options of anything else, and as `tasks.example.found`.
    """
    if given and name in _known() and name not in registry.tasks():
        raise BadInput(f"{name} is no task, and describes itself without settings; leave out --set.")
    if name in registry.methods():
        m = registry.methods()[name]
        decoder = registry.decoder(m.defaults.get("decoder", "mean"))
        return {
            "method": name,
            "version": m.version,
            "summary": m.summary,
            "about": " ".join((m.__doc__ or "").split()),
            "reference": m.reference or "none",
            **({"claim": m.claim} if m.claim else {}),
            "releases": _asked(name) if m.private else "everything: not private",
            "ranked": m.private and not m.control,
            "defaults": m.defaults,
            "decoder": decoder.name,
            "options": registry.defaults_of(m, decoder),
            "searched by leaderboards": {k: f"{low:g} to {high:g}" for k, (low, high) in space.space(name).items()},
        }
    if name in registry.decoders():
        d = registry.decoders()[name]
        return {
            "decoder": name,
            "version": d.version,
            "summary": d.summary,
            "about": " ".join((d.__doc__ or "").split()),
            "reference": d.reference or "none",
            "options": d.options,
            "choices": d.choices,
            "used by": [n for n, m in registry.methods().items() if m.defaults.get("decoder", "mean") == name],
        }
    if name in registry.clippings():
        return _of_rule(registry.clippings()[name])
    if name in registry.tasks():
        return _of_task(registry.tasks()[name], given or {}, data_dir)
    if name in suites.suites():
        suite = suites.load_suite(name)
        return {
            "suite": name,
            "description": suite.description,
            "runs": [f"{s.run_id} {s.label()}" for s in suite.runs],
        }
    aside = [sentence for kind in registry.KINDS for sentence in registry.set_aside(kind)]
    raise BadInput(" ".join([str(unknown("method, decoder, clipping rule, task or suite", name, _known())), *aside]))


def _known() -> list[str]:
    return [*registry.methods(), *registry.decoders(), *registry.clippings(), *registry.tasks(), *suites.suites()]


def _of_task(kind: type[Task], given: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    keys = ("version", "kind", "description", "source", "metric", "higher_is_better", "chance", "threshold")
    facts = {key: getattr(kind, key) for key in keys}
    if given and not kind.options:
        raise BadInput(f"The task {kind.name} has no settings; leave out --set.")
    if lacking := [key for key in given if key not in kind.options]:
        raise unknown(f"setting of task {kind.name}", lacking[0], kind.options)
    task = kind({key: of_task_option(key, value, kind.options[key]) for key, value in given.items()})
    try:
        if not given and task.lacking(data_dir):
            raise CannotRun("Its data are not here, and are fetched by the first run or found with --data-dir.")
        task.validate()
        seen = example.found(task, data_dir)
    except BadInput as problem:
        if given:
            raise
        seen = {"example": f"not shown: {problem}"}
    return {
        "task": kind.name,
        **{key: value for key, value in facts.items() if value is not None},
        "data": _data(kind),
        **({"options": kind.options} if kind.options else {}),
        **({"public": task.public} if task.public else {}),
        **({"users": task.users} if task.users else {}),
        **seen,
    }


def _of_rule(rule: type[ClippingRule]) -> dict[str, Any]:
    beside = ", ".join(f"{name} ({share:g} of the gradient's budget)" for name, share in rule().shares().items())
    return {
        "clipping": rule.name,
        "summary": rule.summary,
        "about": " ".join((rule.__doc__ or "").split()),
        "reference": rule.reference or "none",
        "adaptive": rule.adaptive,
        "releases": f"beside the gradient: {beside}" if beside else "nothing beside the gradient",
        "options": rule.options,
        "choices": rule.choices,
    }


def _asked(method: str) -> list[dict[str, Any]] | str:
    """What a method asks in each kind of step, on the audit's model; a reason where it cannot train that."""
    from dpft.harness.runs.resolve import resolve
    from dpft.harness.train.described import questions
    from dpft.harness.train.run import classify

    try:
        return questions(resolve({"task": "canaries", "method": method, "batch_size": 8, "steps": 100}))
    except (Exception, SystemExit) as reason:  # a plug-in may do anything
        return f"not shown: {classify(reason)[1]}"


def _data(task: type[Task]) -> str:
    """Where the rows come from: a hub id, a package, or files of the user's own."""
    return task.hub or ("your own files" if "content" in task.options else "package")

"""Name -> class for methods, decoders, clipping rules and tasks: modules of their packages, entry points, plug-in files."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

from dpft.harness.errors import BadInput, unknown
from dpft.harness.plugins import loading

# What is registered: what messages call it -> (the package that is searched, the base class, the group of entry points)
KINDS = {
    "method": ("dpft.methods", "Method", "dpft.methods"),
    "decoder": ("dpft.methods.decoders", "Decoder", "dpft.decoders"),
    "clipping rule": ("dpft.methods.clipping", "ClippingRule", "dpft.clippings"),
    "task": ("dpft.tasks", "Task", "dpft.tasks"),
}
_PLUGINS: list[ModuleType] = []


@dataclass(frozen=True)
class Found:
    """What there is of a kind: classes by name, and what is wrong with entry points that had to be set aside, by theirs."""

    classes: dict[str, type] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)


def load_plugin(path: str | Path) -> ModuleType:
    """Import one Python file so that the methods, decoders, clipping rules and tasks it defines are registered.

    A file that is loaded already stays as it is. Raises BadInput when the file is missing, does not import, or defines
    something that breaks its contract (harness/plugins/contract.py).
    """
    path = Path(path)
    for module in _PLUGINS:
        if Path(module.__file__).resolve() == path.resolve():
            return module
    module = loading.imported(path)
    loading.classes(module, bases())
    _PLUGINS.append(module)
    forget()
    return module


def forget() -> None:
    """Collect anew at the next question."""
    _found.cache_clear()


def methods() -> dict[str, type]:
    """All registered methods by name."""
    return _found("method").classes


def decoders() -> dict[str, type]:
    """All registered decoders by name."""
    return _found("decoder").classes


def clippings() -> dict[str, type]:
    """All registered clipping rules by name."""
    return _found("clipping rule").classes


def tasks() -> dict[str, type]:
    """All registered tasks by name."""
    return _found("task").classes


def set_aside(kind: str) -> list[str]:
    """What is wrong with entry points of a kind, a sentence each. They stop nobody who does not ask for what they name."""
    return list(_found(kind).aside.values())


def method(name: str) -> type:
    """The method class called `name`. Raises BadInput with the nearest match."""
    return _called("method", name)


def decoder(name: str) -> type:
    """The decoder class called `name`. Raises BadInput with the nearest match."""
    return _called("decoder", name)


def clipping(name: str) -> type:
    """The clipping rule class called `name`. Raises BadInput with the nearest match."""
    return _called("clipping rule", name)


def task(name: str) -> type:
    """The task class called `name`. Raises BadInput with the nearest match."""
    return _called("task", name)


def _called(kind: str, name: str) -> type:
    found = _found(kind)
    if name in found.classes:
        return found.classes[name]
    if name in found.aside:
        raise BadInput(found.aside[name])
    raise BadInput(" ".join([str(unknown(kind, name, found.classes)), *found.aside.values()]))


def defaults_of(method: type, decoder: type, rule: type | None = None) -> dict[str, Any]:
    """Defaults of all options of a method run with a decoder and a clipping rule: the decoder's < the method's for its own
    decoder, the method's, the rule's. Raises BadInput when two of them use one name for different things.
    """
    parts = [("method", method), ("decoder", decoder)] + ([] if rule is None else [("clipping rule", rule)])
    for (kind, one), (its, other) in combinations(parts, 2):
        if both := sorted(one.options.keys() & other.options.keys()):
            raise BadInput(
                f"{kind.capitalize()} {one.name} and {its} {other.name} both have an option {both[0]!r}; rename one of them."
            )
    own = method.decoder_options if method.defaults.get("decoder", "mean") == decoder.name else {}
    if extra := own.keys() - decoder.options.keys():
        raise BadInput(
            f"{method.name} sets {min(extra)!r}, which decoder {decoder.name} has not; mend decoder_options."
        )
    return {**decoder.options, **own, **method.options, **({} if rule is None else rule.options)}


def make(method_name: str, decoder_name: str, changed: dict[str, Any], clipping_name: str = "abadi") -> Any:
    """The method with its decoder and clipping rule; `changed`: options of the three that differ from their defaults."""
    kind, post, rule = method(method_name), decoder(decoder_name), clipping(clipping_name)
    settings = {**defaults_of(kind, post, rule), **changed}
    chosen = post({key: settings[key] for key in post.options})
    made = kind({key: settings[key] for key in kind.options}, chosen)
    made.rule = rule({key: settings[key] for key in rule.options})
    return made


def instance(spec: Any) -> Any:
    """The method of a RunSpec, with its decoder and clipping rule, which knows its run."""
    made = make(spec.method, spec.decoder, spec.options, spec.clipping)
    made.spec, made.steps = spec, spec.steps
    return made


def is_current(spec: Any) -> bool:
    """Whether task, method and decoder of a RunSpec have the versions that are registered."""
    known = (task(spec.task).version, method(spec.method).version, decoder(spec.decoder).version)
    return known == (spec.task_version, spec.method_version, spec.decoder_version)


def bases() -> dict[type, str]:
    """The base classes of what is registered, with what messages call them."""
    return {_base(kind): kind for kind in KINDS}


def _base(kind: str) -> type:
    package, name, _ = KINDS[kind]
    return getattr(importlib.import_module(f"{package}.base"), name)


@cache
def _found(kind: str) -> Found:
    package, _, group = KINDS[kind]
    base, found = _base(kind), Found()
    root = importlib.import_module(package)
    for module in (importlib.import_module(m.name) for m in pkgutil.walk_packages(root.__path__, f"{package}.")):
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and "name" in vars(cls) and cls.__module__ == module.__name__:
                _add(found, cls, kind)
    for module in _PLUGINS:
        for cls in loading.classes(module, bases()):
            if issubclass(cls, base):
                _add(found, cls, kind)
    for point in entry_points(group=group):
        try:
            _add(found, loading.loaded(point, base, kind), kind, f"{loading.named(point)}: ")
        except BadInput as problem:
            found.aside[point.name] = str(problem)
    return Found(dict(sorted(found.classes.items())), found.aside)


def _add(found: Found, cls: type, kind: str, where: str = "") -> None:
    other = found.classes.setdefault(cls.name, cls)
    if other is not cls:
        raise BadInput(f"{where}Two {kind}s are called {cls.name!r}, in {_where(other)} and {_where(cls)}; rename one.")


def _where(cls: type) -> str:
    return getattr(importlib.import_module(cls.__module__), "__file__", None) or cls.__module__

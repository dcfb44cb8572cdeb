"""Name -> class for methods, decoders, clipping rules and tasks: modules of their packages, entry points, plug-in files."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from itertools import combinations
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput, unknown


def load_plugin(path: str | Path) -> None:
    """Import one Python file so that the methods, decoders, clipping rules and tasks it defines are registered.

    Raises BadInput when the file is missing or does not import.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"There is no plug-in file {path}; give the path of a Python file.")
    name = f"dpft_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise BadInput(
            f"The plug-in file {path} does not import ({type(error).__name__}: {error}); mend it."
        ) from error
    _PLUGINS.append(module)
    forget()


def forget() -> None:
    """Collect anew at the next question."""
    for collection in (methods, decoders, clippings, tasks):
        collection.cache_clear()


_PLUGINS: list = []


@cache
def methods() -> dict[str, type]:
    """All registered methods by name."""
    from dpft.methods.base import Method

    return _collect("dpft.methods", Method)


@cache
def decoders() -> dict[str, type]:
    """All registered decoders by name."""
    from dpft.methods.decoders.base import Decoder

    return _collect("dpft.methods.decoders", Decoder, "dpft.decoders")


@cache
def clippings() -> dict[str, type]:
    """All registered clipping rules by name."""
    from dpft.methods.clipping.base import ClippingRule

    return _collect("dpft.methods.clipping", ClippingRule, "dpft.clippings")


@cache
def tasks() -> dict[str, type]:
    """All registered tasks by name."""
    from dpft.tasks.base import Task

    return _collect("dpft.tasks", Task)


def method(name: str) -> type:
    """The method class called `name`. Raises BadInput with the nearest match."""
    if name not in methods():
        raise unknown("method", name, methods())
    return methods()[name]


def decoder(name: str) -> type:
    """The decoder class called `name`. Raises BadInput with the nearest match."""
    if name not in decoders():
        raise unknown("decoder", name, decoders())
    return decoders()[name]


def clipping(name: str) -> type:
    """The clipping rule class called `name`. Raises BadInput with the nearest match."""
    if name not in clippings():
        raise unknown("clipping", name, clippings())
    return clippings()[name]


def task(name: str) -> type:
    """The task class called `name`. Raises BadInput with the nearest match."""
    if name not in tasks():
        raise unknown("task", name, tasks())
    return tasks()[name]


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


def _collect(package: str, base: type, group: str | None = None) -> dict[str, type]:
    root = importlib.import_module(package)
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    found: dict[str, type] = {}
    for module in modules + _PLUGINS:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and "name" in vars(cls) and cls.__module__ == module.__name__:
                _add(found, cls)
    for point in entry_points(group=group or package):
        _add(found, point.load())
    return dict(sorted(found.items()))


def _add(found: dict[str, type], cls: type) -> None:
    other = found.setdefault(cls.name, cls)
    if other is not cls:
        raise BadInput(f"Two plug-ins are called {cls.name!r} ({other.__module__} and {cls.__module__}); rename one.")

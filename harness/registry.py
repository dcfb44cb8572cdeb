"""Name -> class for methods and tasks: every module of the two packages, entry points, and plug-in files."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from dpft.harness.errors import BadInput, unknown


def load_plugin(path: str | Path) -> None:
    """Import one Python file so that the methods and tasks it defines are registered.

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
    methods.cache_clear()
    tasks.cache_clear()


_PLUGINS: list = []


@cache
def methods() -> dict[str, type]:
    """All registered methods by name."""
    from dpft.methods.base import Method

    return _collect("dpft.methods", Method)


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


def task(name: str) -> type:
    """The task class called `name`. Raises BadInput with the nearest match."""
    if name not in tasks():
        raise unknown("task", name, tasks())
    return tasks()[name]


def _collect(package: str, base: type) -> dict[str, type]:
    root = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(root.__path__)]
    found: dict[str, type] = {}
    for module in modules + _PLUGINS:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and "name" in vars(cls) and cls.__module__ == module.__name__:
                _add(found, cls)
    for point in entry_points(group=package):
        _add(found, point.load())
    return dict(sorted(found.items()))


def _add(found: dict[str, type], cls: type) -> None:
    other = found.setdefault(cls.name, cls)
    if other is not cls:
        raise BadInput(f"Two plug-ins are called {cls.name!r} ({other.__module__} and {cls.__module__}); rename one.")

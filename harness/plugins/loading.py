"""Classes that others write: out of a file, or behind an entry point of an installed package. Bad ones raise BadInput."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

from dpft.harness.errors import BadInput
from dpft.harness.plugins import contract


def imported(path: Path) -> ModuleType:
    """The module of a plug-in file, under a name of its own. Raises BadInput when it is missing or does not import."""
    if not path.is_file():
        raise BadInput(f"There is no plug-in file {path}; give the path of a Python file.")
    if path.suffix != ".py":
        raise BadInput(f"The plug-in file {path} is not a Python file; give one whose name ends in .py.")
    name = f"dpft_plugin_{path.stem}"
    while name in sys.modules:  # of another folder
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise BadInput(f"The plug-in file {path} does not import ({_said(error, path)}); mend it.") from error
    return module


def classes(module: ModuleType, bases: dict[type, str]) -> list[type]:
    """What a plug-in file defines of `bases`, whose values are what messages call them; all of it held to its contract.

    A class without a name may be what others of the file have in common, or private. Raises BadInput for another.
    """
    defined = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = []
    for cls in defined:
        base = next((base for base in bases if issubclass(cls, base)), None)
        if base is None or ("name" not in vars(cls) and _is_a_part(cls, defined)):
            continue
        contract.check(cls, base, f"{module.__file__}: {bases[base]} {cls.__name__}")
        found.append(cls)
    if not found:
        kinds = ", ".join(bases.values())
        raise BadInput(
            f"The plug-in file {module.__file__} defines none of these: {kinds}; write a class of one of them into it, or see "
            "`dpft new --help`."
        )
    return found


def loaded(point: EntryPoint, base: type, kind: str) -> type:
    """The class behind an entry point. Raises BadInput when it cannot be loaded or breaks its contract."""
    where = named(point)
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"{where} does not load {point.value} ({_said(error)}); mend or uninstall that package."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise BadInput(
            f"{where} leads to {point.value}, which is no {kind}; let it name a subclass of {base.__name__}."
        )
    contract.check(cls, base, f"{where}: {kind} {cls.__name__}")
    return cls


def named(point: EntryPoint) -> str:
    """An entry point and its package, to begin a sentence with."""
    return f"The entry point {point.name} ({point.group}) of {point.dist.name if point.dist else 'a package'}"


def _is_a_part(cls: type, defined: list[type]) -> bool:
    return cls.__name__.startswith("_") or any(other is not cls and issubclass(other, cls) for other in defined)


def _said(error: BaseException, path: Path | None = None) -> str:
    """An exception in a few words, with the line of the plug-in file from which it came."""
    if isinstance(error, SystemExit):
        text = "it ends the program by sys.exit"
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    line, where = None, error.__traceback__
    while where is not None:
        if path is not None and Path(where.tb_frame.f_code.co_filename) == path.absolute():
            line = where.tb_lineno
        where = where.tb_next
    return text if line is None else f"line {line}: {text}"

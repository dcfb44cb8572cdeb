"""Suites: tables of arms in a TOML file, each spanning a grid of runs."""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput, unknown
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import RunSpec


@dataclass(frozen=True)
class Suite:
    """A named list of runs."""

    name: str
    description: str
    runs: tuple[RunSpec, ...]


def load_suite(name: str, overrides: dict[str, Any] | None = None, data_dir: Path | None = None) -> Suite:
    """The suite called `name` of tasks/suites.toml, or the one suite in the file at path `name`.

    overrides: settings that replace those of every run (a list is a grid axis). data_dir: as of `resolve`.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise BadInput(f"There is no suite file {name}; give the path of a TOML file.")
        table = _read_toml(path)
        if len(table) != 1:
            raise BadInput(f"{name} must hold exactly one suite (one top-level table), not {len(table)}.")
        name = next(iter(table))
    else:
        table = suites()
        if name not in table:
            raise unknown("suite", name, table)
    suite = table[name]
    extra = suite.keys() - {"description", "base", "arms"}
    if extra or not suite.get("arms"):
        raise BadInput(f"Suite {name!r} needs `arms` and may have `description` and `base`; remove {sorted(extra)}.")
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    runs = [run for arm in suite["arms"] for run in expand({**suite.get("base", {}), **arm, **given}, data_dir)]
    unique = {run.run_id: run for run in runs}
    return Suite(name, suite.get("description", ""), tuple(unique.values()))


def suites() -> dict[str, dict]:
    """The tables of tasks/suites.toml by suite name."""
    from importlib.resources import files

    return _read_toml(files("dpft.tasks") / "suites.toml")


def expand(settings: dict[str, Any], data_dir: Path | None = None) -> list[RunSpec]:
    """One RunSpec per point of the grid that the list-valued settings span, in the order they are written.

    Raises BadInput where an axis has a value twice: its runs would count twice.
    """
    axes = [key for key, value in settings.items() if isinstance(value, list)]
    for key in axes:
        for i, value in enumerate(settings[key]):
            if value in settings[key][:i]:
                raise BadInput(f"The grid of {key} has {value!r} twice; give each value once.")
    points = itertools.product(*(settings[key] for key in axes))
    return [resolve({**settings, **dict(zip(axes, point, strict=True))}, data_dir) for point in points]


def _read_toml(path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"The suite file {path} cannot be read ({error}); mend it.") from error

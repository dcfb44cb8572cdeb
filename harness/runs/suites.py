"""Suites: tables of arms in a TOML file, each spanning a grid of runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dpft.harness.border.documents import from_toml
from dpft.harness.border.files import shown_path
from dpft.harness.border.values import Name, shown
from dpft.harness.errors import BadInput, unknown
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import RunSpec, typed

MOST = 100_000  # runs of one arm


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """A suite as it is written: `base` are settings of all arms; a setting that is a list is an axis of the arm's grid."""

    arms: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    description: str = ""
    base: dict[str, Any] = {}


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
    if name.endswith(".toml"):
        tables = _tables(Path(name))
        if len(tables) != 1:
            raise BadInput(f"{name} must hold exactly one suite (one top-level table), not {len(tables)}; mend it.")
        where, name = f"The suite file {shown_path(name)}", next(iter(tables))
    else:
        tables = suites()
        if name not in tables:
            raise unknown("suite", name, tables)
        where = f"Suite {name!r}"
    suite = tables[name]
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    unique: dict[str, RunSpec] = {}
    for number, arm in enumerate(suite.arms, 1):
        try:
            runs = expand({**suite.base, **arm, **given}, data_dir)
        except BadInput as problem:
            raise type(problem)(f"{where}, arm {number}: {problem}") from None
        unique |= {run.run_id: run for run in runs}
    return Suite(name, suite.description, tuple(unique.values()))


def asked(name: str | None, settings: dict[str, Any], data_dir: Path | None, least: str) -> list[RunSpec]:
    """The runs of the suite `name` with `settings` in place of its own, or of `settings` alone.

    least: what these must have where there is no suite, as the user writes it. Raises BadInput where they have not.
    """
    if name is not None:
        return list(load_suite(name, settings, data_dir).runs)
    if "task" not in settings or "method" not in settings:
        raise BadInput(f"Name a suite (`dpft list suites`), or give at least {least}.")
    return expand(settings, data_dir)


def suites() -> dict[str, Table]:
    """The suites of tasks/suites.toml by name."""
    from importlib.resources import files

    return _tables(files("dpft.tasks") / "suites.toml")


def expand(settings: dict[str, Any], data_dir: Path | None = None) -> list[RunSpec]:
    """One RunSpec per point of the grid that the list-valued settings span, in the order they are written.

    Raises BadInput as `grid`, and for runs that cannot be.
    """
    resolved: dict[str, RunSpec] = {}
    return [_at(settings, point, resolved, data_dir) for point in grid(settings)]


def _at(
    settings: dict[str, Any], point: dict[str, Any], resolved: dict[str, RunSpec], data_dir: Path | None
) -> RunSpec:
    """The run at a point of a grid; points that differ in their seed alone are resolved once."""
    key = repr([value for name, value in point.items() if name != "seed"])
    if "seed" not in point or key not in resolved:
        resolved[key] = resolve({**settings, **point}, data_dir)
        return resolved[key]
    return replace(resolved[key], seed=typed("seed", point["seed"]))


def grid(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The points of the grid that the list-valued settings span, each a value of all of these.

    Raises BadInput where an axis is empty, or has a value twice (its runs would count twice), and for too many points.
    """
    axes = [key for key, value in settings.items() if isinstance(value, list)]
    for key in axes:
        if not settings[key]:
            raise BadInput(f"The grid of {key} is empty; give it a value, or leave it out.")
        for i, value in enumerate(settings[key]):
            if value in settings[key][:i]:
                raise BadInput(f"The grid of {key} has {shown(value)} twice; give each value once.")
    if (count := math.prod(len(settings[key]) for key in axes)) > MOST:
        raise BadInput(
            f"The grid of {', '.join(axes)} has {count:,} runs, more than {MOST:,}; make several suites of it."
        )
    return (dict(zip(axes, point, strict=True)) for point in itertools.product(*(settings[key] for key in axes)))


def _tables(path: Path) -> dict[str, Table]:
    return from_toml(path, dict[Name, Table], "The suite file", "give a TOML file that holds a suite")

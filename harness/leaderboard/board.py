"""A leaderboard as tasks/boards.toml has it: contests of arms at one budget, and the rules that hold for all of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Annotated, Any

import msgspec

from dpft.harness.border.documents import Misfit, fitted, from_toml, sentence
from dpft.harness.border.values import Name, Plain, Positive, Text
from dpft.harness.errors import BadInput, unknown
from dpft.harness.leaderboard.space import points
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import RunSpec
from dpft.harness.runs.suites import grid

FILE = files("dpft.tasks") / "boards.toml"
Few = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Pairs = Annotated[int, msgspec.Meta(ge=2, le=10_000)]
TUNING = 1_000_000  # seeds of tuning count from here, those of tests from 0


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for every arm of a board.

    Attributes:
        trials: settings that are tried for each method, its defaults the first.
        tuning_seeds: rounds of tuning; after each the better half of what was tried goes on with one more seed.
        seeds: fewest and most seeds of a test.
        block: seeds that are added at a time to what is undecided.
        margin: a difference of the metric that is none.
        baseline: the method that all others are compared with.
    """

    trials: Few = 5
    tuning_seeds: Few = 2
    seeds: tuple[Pairs, Pairs] = (4, 12)
    block: Few = 2
    margin: Positive = 0.01
    baseline: Name = "dp-adam"

    def rounds(self, trials: int) -> list[int]:
        """How many of `trials` settings run in each round of tuning; nothing is tuned where there is one."""
        alive = [trials]
        while len(alive) < self.tuning_seeds:
            alive.append(math.ceil(alive[-1] / 2))
        return alive if trials > 1 else []


class _Arm(msgspec.Struct):
    """What an arm has beside the settings of its runs; a list of methods is an arm of each."""

    method: Name | Annotated[list[Name], msgspec.Meta(min_length=1)]
    name: Plain | None = None
    trials: Few | None = None


class _Contest(msgspec.Struct, forbid_unknown_fields=True):
    base: dict[str, Any]
    arms: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    title: Plain = ""


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """A leaderboard as it is written; the settings of its runs are read when they are resolved."""

    contests: Annotated[list[_Contest], msgspec.Meta(min_length=1)]
    description: Text = ""
    rules: Rules = Rules()


@dataclass(frozen=True)
class Arm:
    """A method with its settings in one contest; name: what it is called there; trials: of its tuning."""

    name: str
    settings: dict[str, Any]
    trials: int

    @property
    def control(self) -> bool:
        """Whether it is shown beside the others and not judged."""
        kind = registry.method(self.settings["method"])
        return kind.control or not kind.private

    def points(self) -> list[dict[str, Any]]:
        return points(self.settings["method"], self.trials, self.settings.get("lr"))

    def tried(self, point: dict[str, Any], seed: int) -> RunSpec:
        """A run of tuning; seed counts from 0."""
        return _resolved(json.dumps({**self.settings, **point, "split": "tune", "seed": TUNING + seed}))

    def tested(self, point: dict[str, Any], seed: int) -> RunSpec:
        return _resolved(json.dumps({**self.settings, **point, "split": "test", "seed": seed}))


@dataclass(frozen=True)
class Contest:
    """Arms at one budget on one task; title: what tells it apart."""

    title: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Board:
    name: str
    description: str
    rules: Rules
    contests: tuple[Contest, ...]


@lru_cache(maxsize=100_000)
def _resolved(settings: str) -> RunSpec:
    """Resolved once: a board asks for the same runs again and again."""
    return resolve(json.loads(settings))


@cache
def boards() -> dict[str, Table]:
    """The tables of tasks/boards.toml by name. Raises BadInput, naming the entry, for one that is wrong."""
    return from_toml(FILE, dict[Name, Table], "The file of leaderboards", "mend it")


def load(name: str, overrides: dict[str, Any] | None = None) -> Board:
    """The board called `name`; overrides: settings that replace those of every arm, except its seeds and halves.

    Raises BadInput for unknown names, settings that cannot work, and a board that does not say what it must.
    """
    if name not in boards():
        raise unknown("leaderboard", name, boards())
    table = boards()[name]
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if reserved := given.keys() & {"seed", "split"}:
        raise BadInput(f"A leaderboard has its own seeds and halves; leave out {min(reserved)}.")
    if table.rules.seeds[0] > table.rules.seeds[1]:
        raise BadInput(f"Leaderboard {name} has more fewest than most seeds; mend {FILE.name}.")
    contests = [contest for one in table.contests for contest in _contests(name, one, table.rules, given)]
    return Board(name, table.description, table.rules, tuple(contests))


def _contests(name: str, table: _Contest, rules: Rules, given: dict[str, Any]) -> list[Contest]:
    """One for every point of the grid that the lists of `base` span."""
    base = {**table.base, **given}
    if not isinstance(base.get("task"), str):
        raise BadInput(f"A contest of leaderboard {name} has no one task in its `base`; name it in {FILE.name}.")
    found = []
    for point in grid(base):
        settings = {**base, **point}
        told = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
        )
        title = " ".join(part for part in (settings["task"], table.title, told) if part)
        arms = [arm for one in table.arms for arm in _arms(name, one, settings, rules)]
        if len({arm.name for arm in arms}) < len(arms):
            raise BadInput(f"Two arms of leaderboard {name} have one name; give them `name` in {FILE.name}.")
        found.append(Contest(title, tuple(arms)))
    return found


def _arms(name: str, table: dict[str, Any], settings: dict[str, Any], rules: Rules) -> list[Arm]:
    own = {key: value for key, value in table.items() if key not in _Arm.__struct_fields__}
    try:
        one = fitted(table, _Arm)
    except Misfit as problem:
        raise BadInput(f"An arm of leaderboard {name} cannot be used: {sentence(problem)}; mend {FILE.name}.") from None
    methods = one.method if isinstance(one.method, list) else [one.method]
    trials = rules.trials if one.trials is None else one.trials
    return [Arm(one.name or method, {**settings, **own, "method": method}, trials) for method in methods]

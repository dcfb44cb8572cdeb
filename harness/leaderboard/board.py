"""A leaderboard as tasks/boards.toml has it: contests of arms at one budget, and the rules that hold for all of them."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from dpft.harness.errors import BadInput, unknown
from dpft.harness.leaderboard.space import points
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import RunSpec

FILE = "boards.toml"
TUNING = 1_000_000  # seeds of tuning count from here, those of tests from 0


@dataclass(frozen=True)
class Rules:
    """What holds for every arm of a board.

    Attributes:
        trials: settings that are tried for each method, its defaults the first.
        tuning_seeds: rounds of tuning; after each the better half of what was tried goes on with one more seed.
        seeds: fewest and most seeds of a test.
        block: seeds that are added at a time to what is undecided.
        margin: a difference of the metric that is none.
        baseline: the method that all others are compared with.
    """

    trials: int = 5
    tuning_seeds: int = 2
    seeds: tuple[int, int] = (4, 12)
    block: int = 2
    margin: float = 0.01
    baseline: str = "dp-adam"

    def rounds(self, trials: int) -> list[int]:
        """How many of `trials` settings run in each round of tuning; nothing is tuned where there is one."""
        alive = [trials]
        while len(alive) < self.tuning_seeds:
            alive.append(math.ceil(alive[-1] / 2))
        return alive if trials > 1 else []


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
def boards() -> dict[str, dict[str, Any]]:
    """The tables of tasks/boards.toml by name."""
    return tomllib.loads((files("dpft.tasks") / FILE).read_text(encoding="utf-8"))


def load(name: str, overrides: dict[str, Any] | None = None) -> Board:
    """The board called `name`; overrides: settings that replace those of every arm, except its seeds and halves.

    Raises BadInput for unknown names, settings that cannot work, and a board that does not say what it must.
    """
    if name not in boards():
        raise unknown("leaderboard", name, boards())
    table = boards()[name]
    rules = _rules(name, table.get("rules", {}))
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if reserved := given.keys() & {"seed", "split"}:
        raise BadInput(f"A leaderboard has its own seeds and halves; leave out {min(reserved)}.")
    contests = [contest for one in table["contests"] for contest in _contests(name, one, rules, given)]
    return Board(name, table.get("description", ""), rules, tuple(contests))


def _rules(name: str, table: dict[str, Any]) -> Rules:
    try:
        rules = Rules(**{**table, "seeds": tuple(table.get("seeds", Rules.seeds))})
    except TypeError as error:
        raise BadInput(f"The rules of leaderboard {name} cannot be read ({error}); mend {FILE}.") from None
    fewest, most = rules.seeds
    if not (2 <= fewest <= most and rules.block >= 1 and rules.trials >= 1 and rules.tuning_seeds >= 1):
        raise BadInput(f"Leaderboard {name} needs 2 or more seeds, a block, trials and tuning seeds; mend {FILE}.")
    if not rules.margin > 0:
        raise BadInput(f"The margin of leaderboard {name} must be above zero; mend {FILE}.")
    return rules


def _contests(name: str, table: dict[str, Any], rules: Rules, given: dict[str, Any]) -> list[Contest]:
    """One for every point of the grid that the lists of `base` span."""
    base = {**table["base"], **given}
    axes = [key for key, value in base.items() if isinstance(value, list)]
    found = []
    for point in itertools.product(*(base[key] for key in axes)):
        settings = {**base, **dict(zip(axes, point, strict=True))}
        told = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in zip(axes, point, strict=True)
        )
        title = " ".join(part for part in (settings["task"], table.get("title", ""), told) if part)
        arms = [arm for one in table["arms"] for arm in _arms(one, settings, rules)]
        if len({arm.name for arm in arms}) < len(arms):
            raise BadInput(f"Two arms of leaderboard {name} have one name; give them `name` in {FILE}.")
        found.append(Contest(title, tuple(arms)))
    return found


def _arms(table: dict[str, Any], settings: dict[str, Any], rules: Rules) -> list[Arm]:
    own = {key: value for key, value in table.items() if key not in ("method", "name", "trials")}
    methods = table["method"] if isinstance(table["method"], list) else [table["method"]]
    return [
        Arm(table.get("name", method), {**settings, **own, "method": method}, table.get("trials", rules.trials))
        for method in methods
    ]

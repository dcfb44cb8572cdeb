"""Seeded bad input for every border of the command: options, suites, records, curves, mirrors, baselines, predictions.

`python tests/cases/fuzz.py --cases 5000 --seed 1` counts by border what went wrong; tests/cli/test_fuzz.py makes a few hundred.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import cycle

from .case import Case, Failure, failure
from .commands import COMMANDS
from .files import FILES
from .tables import TABLES
from .world import World

__all__ = ["BORDERS", "Case", "Failure", "World", "cases", "failure"]

BORDERS = {**COMMANDS, **FILES, **TABLES}  # name -> (world, random numbers) -> one bad input


def cases(world: World, count: int, seed: int, borders: tuple[str, ...] = tuple(BORDERS)) -> Iterator[Case]:
    """`count` bad inputs, the borders in turn; each is a function of the seed and its number alone."""
    for number, border in zip(range(count), cycle(borders)):
        world.clear()
        yield BORDERS[border](world, random.Random(f"{seed} {number} {border}"))

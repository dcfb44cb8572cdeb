"""Who the users are where the unit of privacy is a user: which of their examples count, and how many there are. Needs no torch.

Two ways to sample (Charles et al., 2407.07737). `els`: examples by coins of their own, each clipped alone; a user's may be in one
batch together, which the accounting charges (harness/privacy/groups.py). `uls`: users by coins of their own, each with all of its
examples that count; the gradient of their mean loss is clipped once, and a user is to everything else what an example was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun
from dpft.harness.runs import registry

if TYPE_CHECKING:
    from dpft.harness.runs.spec import RunSpec
    from dpft.tasks.base import Data, Prepared, Task


@dataclass(frozen=True)
class Users:
    """members: of every user, in the order of their first rows, the numbers of the rows that count, ascending."""

    members: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[int]:
        """All rows that count, ascending."""
        return sorted(row for own in self.members for row in own)

    @property
    def counts(self) -> tuple[int, int]:
        """(users, examples that count): both public."""
        return len(self.members), sum(map(len, self.members))


def bounded(owners: Sequence[str], identity: Callable[[int], str], group_size: int) -> Users:
    """At most `group_size` rows of each user: those with the smallest hashes of `identity(row)`, so content alone chooses."""
    found: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        found.setdefault(owner, []).append(row)
    return Users(tuple(tuple(_least(own, identity, group_size)) for own in found.values()))


def _least(rows: list[int], identity: Callable[[int], str], group_size: int) -> list[int]:
    if len(rows) <= group_size:
        return rows
    keys = {row: hashlib.sha256(identity(row).encode()).digest() for row in rows}
    return sorted(sorted(rows, key=lambda row: (keys[row], row))[:group_size])


def of_data(task: Task, data: Data, group_size: int, prepared: Prepared | None = None) -> Users:
    """The users of a task's training rows. prepared: what was made of the rows, where it says whose each example is.

    Raises CannotRun where nobody says whose they are.
    """
    if prepared is not None and prepared.users:
        return bounded(prepared.users, str, group_size)
    if not data.users or len(data.users) != len(data.train):
        raise CannotRun(
            f"The data of {task.name} name {len(data.users)} users for {len(data.train)} training rows; name one for each row."
        )
    return bounded(data.users, lambda row: task.identity(data.train[row]), group_size)


@dataclass(frozen=True)
class Sizes:
    """examples: those that count; users: None where the unit is an example; sampled: those that batches are drawn of."""

    examples: int
    users: int | None
    sampled: int

    @property
    def protected(self) -> int:
        """How many there are of what the budget protects."""
        return self.users or self.examples


def sizes(spec: RunSpec, data_dir: Path | None, num_examples: int | None = None, num_users: int | None = None) -> Sizes:
    """Of a run, all public. num_examples, num_users: where they are known. Raises CannotRun as `counts` and `Task.train_size`."""
    if spec.unit == "example":
        examples = num_examples or registry.task(spec.task)(spec.task_options).train_size(data_dir)
        return Sizes(examples, None, examples)
    users, examples = (num_users, num_examples) if num_users and num_examples else counts(spec, data_dir)
    return Sizes(examples, users, users if spec.user_sampling == "uls" else examples)


def counts(spec: RunSpec, data_dir: Path | None) -> tuple[int, int]:
    """(users, examples that count) of a run's task. Raises CannotRun as `of_data`, and as `Task.load`."""
    return _counts(spec.task, json.dumps(spec.task_options, sort_keys=True), spec.group_size, data_dir)


@lru_cache(maxsize=64)
def _counts(task: str, options: str, group_size: int, data_dir: Path | None) -> tuple[int, int]:
    made = registry.task(task)(json.loads(options))
    return of_data(made, made.load(data_dir), group_size).counts

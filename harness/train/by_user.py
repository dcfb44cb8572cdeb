"""Training examples put together by user (harness/runs/users.py), and the loss of a user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpft.harness.engine.base import WEIGHTS, Batch, Loss
from dpft.harness.runs.users import Users
from dpft.tasks.base import Example, Prepared


def grouped(prepared: Prepared, users: Users, user_sampling: str) -> Prepared:
    """`prepared` with the examples that count: each a training example (`els`), or each user's together one (`uls`)."""
    if user_sampling == "els":
        rows = users.rows
        return replace(prepared, train=_at(prepared.train, rows), train_lengths=_at(prepared.train_lengths, rows))
    return replace(
        prepared,
        train=[_at(prepared.train, own) for own in users.members],
        train_lengths=[len(own) * max(_at(prepared.train_lengths, own)) for own in users.members],
        train_collate=Together(prepared.collate),
    )


def _at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[place] for place in places]


def rows_of(example: Any) -> int:
    """How many examples a training example holds: those of a user that is one."""
    return len(example) if isinstance(example, list) else 1


@dataclass(frozen=True)
class Together:
    """Users [each a list of examples] -> tensors [users, rows, ...] and WEIGHTS [users, rows]: rows of the user with the most.

    Who has fewer has the first one again, which weighs nothing.
    """

    collate: Callable[[Sequence[Example]], Batch]

    def __call__(self, users: Sequence[Sequence[Example]], step: int) -> Batch:
        rows = max((len(own) for own in users), default=1)
        flat = [example for own in users for example in [*own, *[own[0]] * (rows - len(own))]]
        batch = {key: tensor.unflatten(0, (len(users), rows)) for key, tensor in self.collate(flat).items()}
        weights = torch.zeros(len(users), rows)
        for row, own in zip(weights, users, strict=True):
            row[: len(own)] = 1 / len(own)
        return {**batch, WEIGHTS: weights}


def mean_loss(loss: Loss) -> Loss:
    """The loss of each user, [users]: the mean over the user's examples; of a batch of examples as it is."""

    def of_users(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if WEIGHTS not in batch:
            return loss(model, batch)
        weights = batch[WEIGHTS]
        flat = {key: tensor.flatten(0, 1) for key, tensor in batch.items() if key != WEIGHTS}
        return (loss(model, flat).view(weights.shape) * weights).sum(1)

    return of_users

"""What to run, by the records of a leaderboard: the nearest contest that was tested, who leads it, the command to start from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.leaderboard.board import Board, Contest
from dpft.harness.leaderboard.state import Look, Standing, judged, leading, plain, standings
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec

GREATEST = 4.0  # of two epsilons, the larger over the smaller: beyond, one says nothing about the other


@dataclass(frozen=True)
class Question:
    """A setting one has: task, model, training examples, epsilon; None: as in the evidence."""

    task: str
    model: str | None = None
    examples: int | None = None
    epsilon: float = 8.0


@dataclass(frozen=True)
class Advice:
    """What records say of a question.

    Attributes:
        contest: the nearest that was tested.
        apart: how it differs from what was asked, in words; empty: it does not.
        level: arms that are not shown to be worse than the leader, the leader first.
        plain: the run without privacy, None where there is none.
        found: all arms.
    """

    contest: Contest
    apart: list[str]
    level: list[Standing]
    plain: Standing | None
    found: list[Standing]


def advise(board: Board, look: Look, question: Question) -> Advice:
    """The nearest contest of the same kind of task. Raises BadInput where no records speak of such a setting."""
    kind = _kind(question.task)
    tested = []
    for contest in board.contests:
        found = standings(contest, board.rules, look)
        if len(judged(found)) > 1:
            tested.append((contest, found))
    if not tested:
        raise BadInput(
            f"Leaderboard {board.name} has no tested methods in these records; make some with `dpft run {board.name}`, or name "
            "another folder with --results."
        )
    alike = [(c, f) for c, f in tested if _kind(_spec(c).task) == kind and _near(_spec(c), question)]
    if not alike:
        settings = "; ".join(contest.title for contest, _ in tested)
        raise BadInput(
            f"No records are about {kind} within a factor of {GREATEST:g} of epsilon {question.epsilon:g}, so there is no "
            f"evidence to advise from; tested were: {settings}."
        )
    contest, found = min(alike, key=lambda one: _distance(_spec(one[0]), _size(one[1]), question))
    first, level, _ = leading(found, board.rules)
    return Advice(contest, _apart(_spec(contest), _size(found), question), [first, *level], plain(found), found)


def command(chosen: Standing, question: Question) -> str:
    """The `dpft run` line to start from: the arm's settings on what was asked."""
    settings = {**chosen.arm.settings, **chosen.tuning.chosen, "task": question.task, "epsilon": question.epsilon}
    if question.model is not None:
        settings["model"] = question.model
    settings["lr"] = chosen.spec.lr
    named = ("task", "model", "method", "epsilon", "batch_size", "steps", "lr")
    left_out = (*named, "eval_every", "eval_examples")
    parts = [f"--{key.replace('_', '-')} {_written(settings[key])}" for key in named if key in settings]
    parts += [f"--set {key}={_written(value)}" for key, value in settings.items() if key not in left_out]
    return "dpft run " + " ".join(parts)


def _kind(task: str) -> str:
    known = registry.task(task)
    return f"{known.kind} of images" if known.images else known.kind


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spec(contest: Contest) -> RunSpec:
    return next(arm for arm in contest.arms if not arm.control).tested({}, 0)


def _size(found: list[Standing]) -> int | None:
    """N of the contest, as its records have it."""
    private = (r["privacy"] for one in found for r in one.records.values() if r["privacy"])
    return next((section["num_examples"] for section in private), None)


def _near(spec: RunSpec, question: Question) -> bool:
    return max(spec.epsilon, question.epsilon) / min(spec.epsilon, question.epsilon) <= GREATEST


def _distance(spec: RunSpec, size: int | None, question: Question) -> tuple:
    other_model = question.model is not None and question.model != spec.model
    ratio = abs(math.log(question.examples / size)) if question.examples and size else 0.0
    return spec.task != question.task, other_model, abs(math.log(spec.epsilon / question.epsilon)) + ratio


def _apart(spec: RunSpec, size: int | None, question: Question) -> list[str]:
    found = []
    if spec.task != question.task:
        found.append(f"it is of task {spec.task}")
    if question.model is not None and spec.model != question.model:
        found.append(f"its model is {spec.model}")
    if spec.epsilon != question.epsilon:
        found.append(f"its epsilon is {spec.epsilon:g}")
    if question.examples is not None and size is not None and question.examples != size:
        found.append(f"it has {size:,} training examples")
    return found

"""What a run should cost: time by the nearest run that was made, memory by that or by prediction."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dpft.harness.cache import cached
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec, completed

ALIKE = (
    "task",
    "model",
    "method",
    "decoder",
    "max_length",
    "precision",
    "views",
)  # without these no run is like another
APART = ("options", "task_options", "clipping", "clip_groups")  # runs that differ in these are further from each other
BUDGET = 8.0  # seconds of work that a command spends on new predictions; those it made are kept, so it goes on when given again
SETTINGS = (
    "decoder",
    "clipping",
    "clip_groups",
    "optimizer",
)  # of a run, beside its options: they may change its memory


class Expected:
    """Estimates for the runs of one command. records: those that there are."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._made: dict[tuple, dict[tuple, _Alike]] = {}
        for record in records:
            if record["cost"]["step_s"]:
                other = completed(record["spec"])
                groups = self._made.setdefault(_kind(other), {})
                groups.setdefault(_setting(other), _Alike(other)).add(record)
        self._spent = 0.0

    def of(self, spec: RunSpec, predict: bool = True) -> dict[str, Any]:
        """`seconds`; `peak_bytes` of a step; `by`: the id of the run that says so, with what differs, or `prediction`; null each
        where nothing is known. predict: whether memory may be predicted.
        """
        mine = spec.to_dict()
        near = self._nearest(mine)
        if near is None:
            peak = self._predicted(spec) if predict else None
            return {"seconds": None, "peak_bytes": peak, "by": None if peak is None else "prediction (memory)"}
        other, record = near
        cost, larger = record["cost"], spec.batch_size / other["batch_size"]
        evaluations = (spec.steps / spec.eval_every + 1) / (other["steps"] / other["eval_every"] + 1)
        seconds = cost["step_s"] * spec.steps * larger + cost["eval_s"] * evaluations
        apart = [key for key in ("batch_size", "options", "task_options") if mine[key] != other[key]]
        by = record["run_id"] + (f", other {' and '.join(apart)}" if apart else "")
        return {"seconds": round(seconds), "peak_bytes": sum(record["cost"]["peak_bytes"].values()), "by": by}

    def _nearest(self, mine: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """(spec, record) of the run that is most like mine. Runs with equal settings are looked at together, so that a folder of
        many seeds and rates takes no longer for each than a small one."""
        groups = self._made.get(_kind(mine), {}).values()
        if not groups:
            return None
        apart = [(group.distance(mine), group) for group in groups]
        least = min(distance for distance, _ in apart)
        return min(
            (group.best(mine["seed"]) for distance, group in apart if distance == least),
            key=lambda pair: (pair[0]["seed"] != mine["seed"], pair[1]["run_id"]),
        )

    def _predicted(self, spec: RunSpec) -> int | None:
        """Live bytes at the peak of a step, of text models; None where that cannot be told, or would take too long now."""
        task = registry.task(spec.task)
        if not registry.method(spec.method).asks or task.images or task.bare_model is _no_model():
            return None
        from dpft.harness.train.settings import MAX_TOKENS

        asked = {
            "model": spec.model,
            "method": spec.method,
            "batch": max(1, min(spec.batch_size, MAX_TOKENS["cpu"] // spec.max_length)),
            "length": spec.max_length,
            "precision": spec.precision,
            "head": "tokens" if task.kind == "generation" else "classes",
            "options": {**{key: getattr(spec, key) for key in SETTINGS}, **spec.options},
        }
        try:
            return cached("memory", asked, lambda value: isinstance(value, int), lambda: self._ask(asked))
        except Exception:  # it is no part of the rehearsal whether a prediction can be made
            return None

    def _ask(self, asked: dict[str, Any]) -> int:
        if self._spent > BUDGET:
            raise TimeoutError
        from dpft.harness.memory.prediction import Question, predict

        begin = time.process_time()
        try:
            return predict(Question(**asked)).total
        finally:
            self._spent += time.process_time() - begin


def _kind(spec: Mapping[str, Any]) -> tuple:
    return tuple(spec[key] for key in ALIKE)


def _setting(spec: Mapping[str, Any]) -> tuple:
    """What the distance to other runs depends on, besides the seed."""
    return spec["batch_size"], *(json.dumps(spec[key], sort_keys=True) for key in APART)


class _Alike:
    """Runs of one kind and setting, of which the first by run id counts for each seed, and for seeds that there are not."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._by_seed: dict[int, Mapping[str, Any]] = {}
        self._first: Mapping[str, Any] | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        seed = record["spec"].get("seed", 0)
        self._by_seed[seed] = _earlier(self._by_seed.get(seed), record)
        self._first = _earlier(self._first, record)

    def distance(self, mine: Mapping[str, Any]) -> tuple[int, float]:
        """Small for settings that are like mine."""
        differ = sum(mine[key] != self._spec[key] for key in APART)
        return differ, abs(math.log(mine["batch_size"] / self._spec["batch_size"]))

    def best(self, seed: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(spec, record) of the run of that seed, or of any."""
        record = self._by_seed.get(seed, self._first)
        return completed(record["spec"]), record


def _earlier(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> Mapping[str, Any]:
    return other if one is None or other["run_id"] < one["run_id"] else one


def _no_model() -> Any:
    from dpft.tasks.base import Task

    return Task.bare_model

"""What runs are made of: fingerprints of data and model as they lie here now, held against those of finished records."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec

SHOWN = 12  # digits of a fingerprint in a message


class Sources:
    """The data in `data_dir` (None: where the task looks itself) and models in local folders and files.

    Each is looked at once, however many runs ask, so make one for each command. Nothing is tokenised and no model is loaded.
    """

    def __init__(self, data_dir: Path | None) -> None:
        self.data_dir = data_dir
        self._found: dict[Hashable, Any] = {}

    def data(self, spec: RunSpec) -> str | None:
        """Fingerprint of the data of `spec`; None where its task draws them itself. Raises CannotRun when they cannot be read."""
        return self._once(spec, "data", lambda task: _fingerprint(task, self.data_dir))

    def train_size(self, spec: RunSpec) -> int:
        """N of `spec`. Raises CannotRun as `data`."""
        return self._once(spec, "N", lambda task: task.train_size(self.data_dir))

    def notes(self, spec: RunSpec) -> Sequence[str]:
        """What the owner of the data of `spec` should know. Raises CannotRun as `data`."""
        return self._once(spec, "notes", lambda task: task.load(self.data_dir).notes)

    def local(self, spec: RunSpec) -> bool:
        """Whether the data of `spec` can be looked at without asking the hub for them."""
        from dpft.tasks.downloads import data_root

        return registry.task(spec.task).hub is None or data_root(self.data_dir) is not None

    def model(self, spec: RunSpec) -> str | None:
        """Fingerprint of the files of a model that is a local path; None for others. Raises CannotRun for a missing path."""
        from dpft.tasks.model_files import files_fingerprint

        return self._remembered(("model", spec.model), lambda: files_fingerprint(spec.model))

    def _once(self, spec: RunSpec, what: str, ask: Callable[[Any], Any]) -> Any:
        key = (what, spec.task, json.dumps(spec.task_options, sort_keys=True))
        return self._remembered(key, lambda: ask(registry.task(spec.task)(spec.task_options)))

    def _remembered(self, key: Hashable, ask: Callable[[], Any]) -> Any:
        if key not in self._found:
            try:
                self._found[key] = ask()
            except Exception as error:  # a plug-in's task may raise anything; asked again it would raise it again
                known = isinstance(error, BadInput)
                self._found[key] = CannotRun(str(error) if known else f"{type(error).__name__}: {error}")
        if isinstance(found := self._found[key], CannotRun):
            raise CannotRun(str(found))
        return found


def _fingerprint(task: Any, data_dir: Path | None) -> str | None:
    """That of `task.fingerprint`, unless a class derived from the one that defines it loads other data."""
    line = [vars(one) for one in type(task).__mro__]
    short, long = (
        next((i for i, one in enumerate(line) if name in one), len(line)) for name in ("fingerprint", "load")
    )
    return task.fingerprint(data_dir) if short <= long else task.load(data_dir).fingerprint


def differences(record: dict[str, Any], spec: RunSpec, sources: Sources) -> list[tuple[str, str | None, str | None]]:
    """(what, its fingerprint in the record, its fingerprint now) of everything that is not what `record` was made of.

    A run that failed before its data were loaded says nothing of them and is held against nothing, and so is the model of a
    record older than `model_files`. Raises CannotRun when something that the record speaks of cannot be read now.
    """
    made = record["provenance"] or {}
    found = []
    if (then := made.get("data_fingerprint")) is not None and (now := sources.data(spec)) not in (None, then):
        found.append(("data", then, now))
    if then is not None and "model_files" in made and (now := sources.model(spec)) != made["model_files"]:
        found.append(("model", made["model_files"], now))
    return found


def check(kept: Iterable[tuple[RunSpec, dict[str, Any]]], sources: Sources, folder: Path) -> None:
    """Raises BadInput unless each of the records was made of the data and the model that are here now, naming the first."""
    others, unreadable = [], []
    for spec, record in kept:
        try:
            others += [(spec, difference) for difference in differences(record, spec, sources)]
        except CannotRun as error:
            unreadable.append(str(error).rstrip("."))
    if others:
        spec, (what, then, now) = others[0]
        many = f", the first of {len(others)} such," if len(others) > 1 else ""
        raise BadInput(
            f"Run {spec.run_id} ({spec.label()}){many} was made of other {what}: fingerprint {shown(then)} then, {shown(now)} "
            f"now; give --overwrite to make it anew, or keep both with another folder (--results)."
        )
    if unreadable:
        raise CannotRun(
            f"The data or model of {_runs(len(unreadable))} cannot be read, so nothing says that the table is of them "
            f"({unreadable[0]}); mend that, or print the records as they are with `dpft report {folder}`."
        )


def check_readable(specs: Iterable[RunSpec], sources: Sources) -> None:
    """Raises CannotRun unless data and models of all of `specs` are there: their records are about to be replaced."""
    for spec in specs:
        try:
            sources.data(spec), sources.model(spec)
        except CannotRun as error:
            raise CannotRun(f"Run {spec.run_id} is kept, because it could not be made again: {error}") from None


def shown(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:SHOWN]


def _runs(count: int) -> str:
    return "a finished run" if count == 1 else f"{count} finished runs"

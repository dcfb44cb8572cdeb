"""Models and data fetched, read and tokenised once, so that the runs need no network afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dpft.harness.errors import CannotRun
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec
from dpft.tasks.base import ModelSpec
from dpft.tasks.downloads import patient
from dpft.tasks.hub import Fetch, silent


def lacking(runs: Sequence[RunSpec], data_dir: Path | None) -> list[Fetch]:
    """What the runs need that is not here, once each. Raises CannotRun where something is missing that cannot be fetched."""
    found: dict[tuple[str, str], Fetch] = {}
    for spec in _apart(runs).values():
        task = registry.task(spec.task)(spec.task_options)
        for one in (*task.lacking(data_dir), *task.lacking_model(spec.model)):
            found.setdefault((one.what, one.source), one)
    return list(found.values())


def none_can_be_made(runs: Sequence[RunSpec], data_dir: Path | None) -> str | None:
    """Why not a single one of `runs` can be made here, where that is a hub that does not answer, in a sentence; else None.

    Found without torch: whoever has no network hears of it at once. Other runs end as records, each with its own reason.
    """
    sentence = None
    for spec in _apart(runs).values():
        task = registry.task(spec.task)(spec.task_options)
        try:
            away = [
                one for one in (*task.lacking(data_dir), *task.lacking_model(spec.model)) if one.source == "the hub"
            ]
        except Exception:  # of a plug-in, too: the run says it
            return None
        if not away or not (why := silent()):
            return None
        sentence = sentence or _cannot(away[0], why)
    return sentence


def refuse(runs: Sequence[RunSpec], data_dir: Path | None) -> None:
    """Raises CannotRun where what the runs need is not here and cannot be had: a board's failed runs stand, and decide."""
    lacking(runs, data_dir)
    if reason := none_can_be_made(runs, data_dir):
        raise CannotRun(reason)


def _cannot(one: Fetch, why: str) -> str:
    return f"{one.what[0].upper()}{one.what[1:]} cannot be fetched: {why}; {one.instead}."


def fetch(fetches: Sequence[Fetch], told: Callable[[str], None]) -> None:
    """Fetch all of them; `told` hears of each before. Raises CannotRun for the first that cannot be had."""
    for one in fetches:
        if one.source == "the hub" and (why := silent()):
            raise CannotRun(_cannot(one, why))
        told(f"fetching {one.what} from {one.source}")
        with patient():
            one.get()


def read(runs: Sequence[RunSpec], data_dir: Path | None, told: Callable[[str], None]) -> None:
    """Load every model and tokenise every data set as the runs will, so that whatever is wrong with them is found now.

    Raises CannotRun.
    """
    import torch

    for spec in _apart(runs).values():
        task = registry.task(spec.task)(spec.task_options)
        told(f"reading {spec.task} for {spec.model}")
        model = ModelSpec(spec.model, spec.head, spec.max_length, spec.views, spec.batch_norm)
        task.prepare(task.load(data_dir), model, torch.Generator())


def _apart(runs: Sequence[RunSpec]) -> dict[tuple, RunSpec]:
    """One run for each task with its options, model and way of reading it."""
    return {
        (spec.task, repr(spec.task_options), spec.model, spec.head, spec.max_length, spec.views, spec.batch_norm): spec
        for spec in runs
    }

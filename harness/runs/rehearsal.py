"""What would stop runs, found before any is made: data, models, what methods do with them, disk. No weights are loaded."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.plugins import blame
from dpft.harness.records.store import Store
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec, types
from dpft.tasks.base import ModelSpec
from dpft.tasks.hub import Fetch, silent

STATES = 4  # numbers kept a trained number: itself, Adam's two moments, and one for what methods and decoders keep


@dataclass
class Findings:
    """problems: sentence -> the runs that it stops; skips: a method's reason not to run -> its runs; fetches: what is to be
    fetched first, once each."""

    problems: dict[str, list[RunSpec]] = field(default_factory=dict)
    skips: dict[str, list[RunSpec]] = field(default_factory=dict)
    fetches: list[Fetch] = field(default_factory=list)

    def by_run(self) -> dict[str, list[str]]:
        """Run id -> what stops it; runs that nothing stops are left out."""
        found: dict[str, list[str]] = {}
        for sentence, runs in self.problems.items():
            for spec in runs:
                found.setdefault(spec.run_id, []).append(sentence)
        return found


def rehearse(runs: Iterable[RunSpec], store: Store, data_dir: Path | None) -> Findings:
    """Look at everything that `runs` need. Each task's data, each model and each method on it is looked at once."""
    found, stage = Findings(), _Stage(data_dir)
    largest = 0
    for spec in runs:
        fetches, problems = stage.needs(spec)
        found.fetches += [fetch for fetch in fetches if fetch not in found.fetches]
        if not fetches and not problems:
            trained, problems = stage.trained(spec)
            if isinstance(trained, str):
                found.skips.setdefault(trained, []).append(spec)
            else:
                largest = max(largest, trained)
        for sentence in problems:
            found.problems.setdefault(sentence, []).append(spec)
    if found.fetches and (why := silent()):
        for fetch in found.fetches:
            if fetch.remote and fetch.source == "the hub":
                instead = f"; {fetch.instead}" if fetch.instead else ""
                stopped = [spec for spec in runs if fetch in stage.needs(spec)[0]]
                found.problems[f"{_begun(fetch.what)} is not here, and {why}{instead}."] = stopped
    if sentence := _disk(store.folder, largest):
        found.problems[sentence] = list(runs)
    return found


class _Stage:
    """Answers that were given already."""

    def __init__(self, data_dir: Path | None):
        self.data_dir = data_dir
        self._known: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, ask: Callable[[], Any], otherwise: Any) -> tuple[Any, list[str]]:
        """(answer, no problem), or (otherwise, [the sentence])."""
        if key not in self._known:
            try:
                self._known[key] = ask(), []
            except BadInput as error:
                self._known[key] = otherwise, [str(error)]
            except (Exception, SystemExit) as error:  # of a library or a plug-in: the run would end with it
                plain = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self._known[key] = otherwise, [blame.told(error) or plain]
        return self._known[key]

    def needs(self, spec: RunSpec) -> tuple[list[Fetch], list[str]]:
        """(what is to be fetched, what cannot be had) of data and model."""
        task = registry.task(spec.task)(spec.task_options)
        data, bad = self._once(("data", *_task(spec)), lambda: task.lacking(self.data_dir), [])
        model, worse = self._once(
            ("model", type(task).lacking_model, spec.model), lambda: task.lacking_model(spec.model), []
        )
        return [*data, *model], [*bad, *worse]

    def trained(self, spec: RunSpec) -> tuple[int | str, list[str]]:
        """(how many numbers the method trains, 0 where that is not known, or why it skips; what stops it) on a model without
        weights."""
        settings = {key: getattr(spec, key) for key in types() if key not in _IRRELEVANT}
        return self._once(("method", repr(settings)), lambda: self._prepare(spec), 0)

    def _prepare(self, spec: RunSpec) -> int | str:
        task = registry.task(spec.task)(spec.task_options)
        wanted = ModelSpec(spec.model, spec.head, spec.max_length, spec.views, spec.batch_norm)
        model, problems = self._once(("bare", *_task(spec), wanted), lambda: task.bare_model(wanted), None)
        if problems:
            raise BadInput(problems[0])
        if model is None:
            return 0
        import torch

        from dpft.harness.train.hooks import check_reason
        from dpft.harness.train.public_rows import needed

        method, model = registry.instance(spec), copy.deepcopy(model)
        if needed(method):
            return 0
        if (reason := method.skip(model)) is not None:
            check_reason(method, reason)
            return reason
        method.noise_multiplier = 1.0
        try:
            model = method.prepare(model, torch.Generator().manual_seed(0))
        except (NotImplementedError, RuntimeError) as error:
            if any(
                word in str(error) for word in ("meta", "set_data")
            ):  # it computes with weights, which are not there
                return 0
            raise
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not trained:
            raise BadInput(f"{spec.method} leaves nothing trainable in {spec.model}; mend its `prepare`.")
        return trained


_IRRELEVANT = (
    "seed",
    "lr",
    "epsilon",
    "delta",
    "steps",
    "batch_size",
    "clip_norm",
    "eval_every",
    "eval_examples",
    "schedule",
)


def _task(spec: RunSpec) -> tuple[str, str]:
    return spec.task, repr(sorted(spec.task_options.items()))


def _begun(text: str) -> str:
    return text[0].upper() + text[1:]


def _disk(folder: Path, trained: int) -> str | None:
    """Whether `folder` can be written to and has room for a checkpoint beside the one that it replaces; in words, if not."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK):
        return f"Results cannot be written to {folder}; choose --results DIR."
    wanted, free = 2 * STATES * 4 * trained, shutil.disk_usage(there).free
    if wanted > free:
        return (
            f"The disk of {folder} has {free / 2**30:.1f} GiB free, and checkpoints of {trained:,} trained numbers may take "
            f"{wanted / 2**30:.1f}; make room, or choose another with --results DIR."
        )
    return None

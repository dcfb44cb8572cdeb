"""Pending specs -> records, one after another: claims, checkpoints, shards, progress."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.execution import interrupts
from dpft.harness.records.store import Store
from dpft.harness.runs import sources as origin
from dpft.harness.runs.sources import Sources
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import ranks
from dpft.harness.train.journal import path_of


@dataclass(frozen=True)
class Policy:
    """Which runs are made. shard (i, n): every n-th run, from the i-th, i counted from 1.

    seen: stamps of the records that there were when the command was given (Store.stamps); one that has replaced another since
    then is not made again by a process that shares the work. None: every record is as it was.
    """

    retry_failed: bool = False
    overwrite: bool = False
    resume: bool = True
    shard: tuple[int, int] = (1, 1)
    seen: Mapping[str, tuple[int, ...]] | None = None


def shard(runs: Sequence[RunSpec], part: tuple[int, int]) -> list[RunSpec]:
    """The runs of one shard, chosen by position in the suite."""
    index, count = part
    if not 1 <= index <= count:
        raise BadInput(f"--shard {index}/{count} is not i/n with 1 <= i <= n; correct it.")
    return list(runs)[index - 1 :: count]


def wanted(runs: Sequence[RunSpec], store: Store, policy: Policy) -> list[RunSpec]:
    """The runs of this shard, without those whose damaged records the store passes over; it raises BadInput where it does not."""
    runs = shard(runs, policy.shard)
    kept = set(store.unspoilt([spec.run_id for spec in runs]))
    return [spec for spec in runs if spec.run_id in kept]


def is_pending(store: Store, spec: RunSpec, policy: Policy) -> bool:
    """Whether `spec` has still to be run under `policy`."""
    record = store.summary(spec.run_id)
    return record is None or _again(store, record, policy)


def _again(store: Store, record: dict[str, Any], policy: Policy) -> bool:
    again = policy.overwrite or (policy.retry_failed and record["status"] not in ("done", "skipped"))
    run_id = record["run_id"]
    return again and (policy.seen is None or store.stamps([run_id]).get(run_id) == policy.seen.get(run_id))


def pending(runs: Iterable[RunSpec], store: Store, policy: Policy, sources: Sources) -> list[RunSpec]:
    """Those of `runs` that have still to be run.

    Raises BadInput where a record that stays was made of other data or another local model than are here now, and CannotRun
    where that cannot be told because they are not here, or where they would be needed to replace a finished run.
    """
    todo, kept, replaced = [], [], []
    for spec in runs:
        record = store.summary(spec.run_id)
        if record is None or _again(store, record, policy):
            todo.append(spec)
            if record is not None and record["status"] == "done":
                replaced.append(spec)
        else:
            kept.append((spec, {key: record[key] for key in ("run_id", "provenance")}))
    origin.check(kept, sources, store.folder)
    origin.check_readable(replaced, sources)
    return todo


def run_all(
    runs: Sequence[RunSpec],
    store: Store,
    settings,
    policy: Policy,
    reporter: Reporter,
    sources: Sources | None = None,
    up: Callable[[], bool] = lambda: False,
    compared: set[str] | None = None,
) -> list[dict[str, Any]]:
    """Make what is pending of `runs`; returns the records of all of them, in order.

    up: asked before each run; once it is true no other is begun, and the records are those that are there.

    compared: what earlier calls have compared with autograd (train/guard.py); runs of one kind are compared once.

    A run that another process is making is left to the end and waited for. A run that fails is a record with a
    status, and the others go on. An interrupt ends the run in flight after its step, with a checkpoint (interrupts.py).
    sources: what the command has looked at already. Raises as `pending`, also for records that other processes made meanwhile.
    """
    store.open_for_writing()
    sources = sources or Sources(settings.data_dir)
    runs = wanted(runs, store, policy)
    todo = pending(runs, store, policy, sources)
    elsewhere, made, compared = [], set(), set() if compared is None else compared
    for spec in todo:
        if up():
            return collect([spec for spec in runs if store.summary(spec.run_id) is not None], store, made, sources)
        with store.claim(spec.run_id) as mine:
            if not mine:
                elsewhere.append(spec)
            elif is_pending(store, spec, policy):  # another process may have made it meanwhile
                _make(spec, store, settings, policy, reporter, compared)
                made.add(spec.run_id)
    for spec in elsewhere:
        reporter.note(f"{spec.label()} is being made by another process; waiting for it.")
        with store.claim(spec.run_id, wait=True):
            if store.summary(spec.run_id) is None:  # the other process died
                _make(spec, store, settings, policy, reporter, compared)
                made.add(spec.run_id)
    return collect(runs, store, made, sources)


def collect(runs: Sequence[RunSpec], store: Store, made: set[str], sources: Sources) -> list[dict[str, Any]]:
    """The records of `runs`; those not in `made` are held against what is here, as another process may have had other data."""
    records = [store.summary(spec.run_id) for spec in runs]
    both = zip(runs, records, strict=True)
    origin.check([(spec, record) for spec, record in both if spec.run_id not in made], sources, store.folder)
    return records


def _make(spec: RunSpec, store: Store, settings, policy: Policy, reporter: Reporter, compared: set[str]) -> None:
    from dpft.harness.train.run import execute  # torch is imported when there is something to run

    path, together = store.checkpoint_path(spec.run_id), ranks.here()
    store.sweep()
    if not policy.resume:
        path.unlink(missing_ok=True)
        path_of(path).unlink(missing_ok=True)
    together.everyones((spec, settings, path, compared))  # for this the others wait, in launching.py
    with interrupts.between_steps(together.everyones) as pausing:
        with reporter.run(spec) as observe:
            record, curve = execute(spec, settings, pausing(observe), path, reporter.note, compared=compared)
        store.write(record, curve)
        reporter.finished(record)
    gc.collect()  # a model is in cycles with its taps: several of them, with their optimizers, would wait for the collector


class Reporter:
    """What the executor tells while it works; the command line shows it as bars or lines."""

    def run(self, spec: RunSpec) -> Any:
        """A context manager around one run that gives its observer, `observe(step, row)`."""
        raise NotImplementedError

    def finished(self, record: dict[str, Any]) -> None:
        """A record has been written."""
        raise NotImplementedError

    def note(self, text: str, trouble: bool = True) -> None:
        """Something the user should know; trouble: also one who asked for quiet."""
        raise NotImplementedError

"""The runs of a suite on a Ray cluster: its workers make records, this process claims the runs and writes what comes back."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.harness.errors import CannotRun, Interrupted
from dpft.harness.execution import interrupts
from dpft.harness.execution.local import Policy, Reporter, collect, pending, wanted
from dpft.harness.records.store import Store, atomic
from dpft.harness.runs.sources import Sources
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import journal
from dpft.harness.train.settings import Settings

BETWEEN = 0.5  # seconds between two looks of a worker at whether it is to end


def run_all(
    runs: Sequence[RunSpec],
    store: Store,
    settings: Settings,
    policy: Policy,
    reporter: Reporter,
    jobs: int | None,
    plugins: Sequence[str],
    sources: Sources | None = None,
) -> list[dict[str, Any]]:
    """Make what is pending of `runs`, as execution.run_all does; returns the records of all of them, in order.

    jobs: runs at once, None: as many as there are GPUs, or CPUs. A run gets its share of the CPUs and, where the cluster has
    GPUs and `settings.device` is not the CPU, its share of those. Joins the cluster that RAY_ADDRESS names, or starts one here.
    dpft, plug-in files and the data mirror must lie at the same paths on every node. When this process is interrupted, workers
    end their steps and send their checkpoints, from which the next command goes on; a run that its worker takes with it is
    made again. With `settings.secure_noise` each release is counted here before a worker makes it, so that it is charged then.
    Raises CannotRun without ray, and, when everything else has been made, for runs that were lost.
    """
    try:
        import ray
    except ImportError:
        raise CannotRun(
            "--executor ray needs the package ray; run `pip install 'dpft[ray]'`, or leave the option out."
        ) from None
    store.open_for_writing()
    runs = wanted(runs, store, policy)
    sources = sources or Sources(settings.data_dir)
    lost: list[str] = []
    made: set[str] = set()
    with ExitStack() as stack:
        todo = pending(runs, store, policy, sources)
        claimed = [spec for spec in todo if stack.enter_context(store.claim(spec.run_id))]  # until all of them are made
        if claimed:
            _start(ray)
            stack.callback(ray.shutdown)
            share, most = _share(ray.cluster_resources(), settings.device, jobs)
            work = ray.remote(_work).options(max_retries=0, **share)
            home = _beside(ray.remote(_Home)).remote()
            waiting, flying = list(claimed), {}

            def landed(done) -> None:
                """Keep what a worker sends: its checkpoint, and the record unless it was asked to stop."""
                spec = flying.pop(done)
                try:
                    found = ray.get(done)
                except ray.exceptions.RayError as error:
                    lost.append(spec.label())
                    reporter.note(f"{spec.label()} was lost ({type(error).__name__}).")
                    return
                for text in found.notes:
                    reporter.note(text)
                _keep(_places(store.checkpoint_path(spec.run_id)), found.kept)
                if found.record is None:
                    return
                store.write(found.record, found.curve)
                made.add(spec.run_id)
                with reporter.run(spec) as observe:
                    for row in found.curve:
                        observe(row["step"], row)
                reporter.finished(found.record)

            try:
                while waiting or flying:
                    while waiting and len(flying) < most:
                        spec = waiting.pop(0)
                        places = _places(store.checkpoint_path(spec.run_id))
                        if not policy.resume:
                            for path in places:
                                path.unlink(missing_ok=True)
                        counted = str(places[1].absolute())
                        sent = _Task(spec, settings, tuple(plugins), share["num_cpus"], _read(places), counted)
                        flying[work.remote(sent, home)] = spec
                    landed(ray.wait(list(flying), num_returns=1)[0][0])
            except KeyboardInterrupt:  # ray makes one of what a handler raises
                home.stop.remote()
                for done in ray.wait(list(flying), num_returns=len(flying), timeout=interrupts.GRACE)[0]:
                    landed(done)
                interrupts.end()
                raise
    for spec in runs:
        if store.summary(spec.run_id) is None and spec.label() not in lost:
            reporter.note(f"{spec.label()} is being made by another process; waiting for it.")
            with store.claim(spec.run_id, wait=True):
                if store.summary(spec.run_id) is None:
                    lost.append(spec.label())
    if lost:
        raise CannotRun(f"{len(lost)} runs were lost with their workers, the others are there; give the command again.")
    return collect(runs, store, made, sources)


def _start(ray) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a run without a GPU keeps what the user has set
    with interrupts.kept():
        ray.init(
            address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False, configure_logging=False
        )


def _share(resources: dict[str, float], device: str, jobs: int | None) -> tuple[dict[str, float], int]:
    """(what one run asks of the cluster, runs at once)."""
    cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0) if device != "cpu" else 0.0
    most = jobs or int(gpus or cpus)
    share = {"num_cpus": max(1, math.floor(cpus / most))}
    if gpus:
        share["num_gpus"] = 1 if most <= gpus else gpus / most
    return share, most


def _beside(actor):
    """An actor on the node of this process, whose disk has the results."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return actor.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))


class _Home:
    """An actor beside the driver: workers ask it between steps whether to end, and tell it of releases before they make them."""

    def __init__(self) -> None:
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def stopped(self) -> bool:
        return self._stopped

    def count(self, path: str) -> None:
        """One release of a run whose journal is at `path`; on disk when this returns."""
        journal.note(Path(path))


@dataclass(frozen=True)
class _Task:
    """What a worker is sent for one run.

    Attributes:
        threads: that it may use.
        kept: of an earlier command, to go on from: contents of its `_places`.
        journal: where the driver's node counts its releases.
    """

    spec: RunSpec
    settings: Settings
    plugins: tuple[str, ...]
    threads: int
    kept: tuple[bytes, ...]
    journal: str


@dataclass(frozen=True)
class _Sent:
    """What comes back of one run. record: None where it was stopped. kept: contents of its `_places`, empty if not there."""

    record: dict[str, Any] | None
    curve: list[dict[str, Any]]
    kept: tuple[bytes, ...]
    notes: list[str]


def _work(task: _Task, home) -> _Sent:
    """One run on a worker, which keeps its process for others. home: the actor `_Home`."""
    import ray
    import torch

    from dpft.harness.runs import registry
    from dpft.harness.train.run import execute
    from dpft.harness.train.settings import pick_device

    spec = task.spec
    for plugin in task.plugins:
        registry.load_plugin(plugin)
    torch.set_num_threads(task.threads)
    settings = dataclasses.replace(task.settings, device=pick_device(task.settings.device))
    notes, looked = [], time.monotonic()

    def observe(step: int, row: dict[str, Any]) -> None:
        nonlocal looked
        if time.monotonic() - looked > BETWEEN:
            looked = time.monotonic()
            if ray.get(home.stopped.remote()):
                raise Interrupted(signal.SIGTERM)

    def witness() -> None:
        ray.get(home.count.remote(task.journal))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{spec.run_id}.ckpt"
        _keep(_places(path), task.kept)
        try:
            record, curve = execute(
                spec, settings, observe, path, lambda text, trouble=True: notes.append(text), witness
            )
        except Interrupted:
            record, curve = None, []
        return _Sent(record, curve, _read(_places(path)), notes)


def _places(checkpoint: Path) -> tuple[Path, Path]:
    return checkpoint, journal.path_of(checkpoint)


def _read(paths: tuple[Path, Path]) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() if path.exists() else b"" for path in paths)


def _keep(paths: tuple[Path, Path], kept: tuple[bytes, ...]) -> None:
    """Write what there is; what is empty was never there. A count of releases is not replaced by a lower one."""
    for path, content in zip(paths, kept, strict=True):
        if len(content) > (journal.releases(path) if path == paths[1] else 0):
            with atomic(path) as temporary:
                temporary.write_bytes(content)

"""The runs of a suite on a Ray cluster: its workers make records, this process claims the runs and writes what comes back."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.execution import interrupts
from dpft.harness.execution.local import Policy, Reporter, collect, pending, wanted
from dpft.harness.records.store import Store
from dpft.harness.runs.sources import Sources
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train.settings import Settings


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
    dpft, plug-in files and the data mirror must lie at the same paths on every node. There are no checkpoints: a run that
    its worker takes with it is made again by the next command. Raises CannotRun without ray, and, when everything else has
    been made, for runs that were lost.
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
            waiting, flying = list(claimed), {}
            while waiting or flying:
                while waiting and len(flying) < most:
                    spec = waiting.pop(0)
                    flying[work.remote(spec, settings, list(plugins), share["num_cpus"])] = spec
                [done], _ = ray.wait(list(flying), num_returns=1)
                spec = flying.pop(done)
                try:
                    record, curve = ray.get(done)
                except ray.exceptions.RayError as error:
                    lost.append(spec.label())
                    reporter.note(f"{spec.label()} was lost ({type(error).__name__}).")
                    continue
                store.write(record, curve)
                made.add(spec.run_id)
                with reporter.run(spec) as observe:
                    for row in curve:
                        observe(row["step"], row)
                reporter.finished(record)
    for spec in runs:
        if store.read(spec.run_id) is None and spec.label() not in lost:
            reporter.note(f"{spec.label()} is being made by another process; waiting for it.")
            with store.claim(spec.run_id, wait=True):
                if store.read(spec.run_id) is None:
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


def _work(spec: RunSpec, settings: Settings, plugins: list[str], threads: int) -> tuple[dict[str, Any], list]:
    """One run on a worker, which keeps its process for others: (record, curve)."""
    import torch

    from dpft.harness.runs import registry
    from dpft.harness.train.run import execute
    from dpft.harness.train.settings import pick_device

    for plugin in plugins:
        registry.load_plugin(plugin)
    torch.set_num_threads(threads)
    settings = dataclasses.replace(settings, device=pick_device(settings.device))
    return execute(spec, settings, lambda step, row: None)

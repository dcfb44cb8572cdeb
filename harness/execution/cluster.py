"""The runs of a suite on a Ray cluster: its workers make records, this process claims the runs and writes what comes back."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from dpft.harness.errors import CannotRun, first_line
from dpft.harness.execution import interrupts
from dpft.harness.execution.local import Policy, Reporter, collect, is_pending, pending, wanted
from dpft.harness.execution.on_node import Home, Sent, Task, keep, places, read, work
from dpft.harness.execution.slots import Share, share
from dpft.harness.records.store import Store
from dpft.harness.runs.sources import Sources
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train.settings import Settings

LOOK = 0.5  # seconds between looks at what workers tell
TRIES = 3  # of a run whose worker or node is lost
SILENT = 60.0  # seconds without a run that begins, after which it is said what is waited for


def run_all(
    runs: Sequence[RunSpec],
    store: Store,
    settings: Settings,
    policy: Policy,
    reporter: Reporter,
    jobs: int | None,
    plugins: Sequence[str],
    sources: Sources | None = None,
    up: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Make what is pending of `runs`, as execution.run_all does; returns the records of all of them, in order.

    jobs: runs at once, None: as many as there are GPUs, or CPUs, also of nodes that come later. What each gets: slots.py. Joins
    the cluster that RAY_ADDRESS names, or starts one here; any number of commands may share one, and one folder of results.
    dpft, plug-in files and data must lie at the same paths on every node.

    Rows come while a run is made. Checkpoints come to the store here, so that no folder need be shared: a run whose worker or
    node is lost goes on from the last one, elsewhere, up to TRIES times; so does a command that is given again. With
    `settings.secure_noise` each release is counted here before a worker makes it, so that it is charged then.
    Raises CannotRun without ray or a cluster that can make them, and for runs that were lost, when all else has been made.
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
    todo = pending(runs, store, policy, sources)
    made: set[str] = set()
    if todo:
        if settings.data_dir is not None:
            settings = dataclasses.replace(settings, data_dir=Path(settings.data_dir).absolute())
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # ray's own remarks would stand between the records
            _start(ray)
            stack.callback(ray.shutdown)
            driver = _Driver(ray, store, settings, policy, reporter, jobs, [os.path.abspath(one) for one in plugins])
            stack.callback(driver.close)
            driver.make(todo, up)
        made = driver.made
        if driver.lost:
            told = f"{len(driver.lost)} runs were lost" if len(driver.lost) > 1 else "A run was lost"
            raise CannotRun(f"{told}, the others are there; give the command again. {next(iter(driver.lost.values()))}")
    return collect([spec for spec in runs if store.summary(spec.run_id) is not None], store, made, sources)


def _start(ray) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a run without a GPU keeps what the user has set
    address = os.environ.get("RAY_ADDRESS")
    with interrupts.kept():
        try:
            _reach(address)
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except (Exception, SystemExit) as error:  # of many kinds, and none is documented
            what = f"of RAY_ADDRESS ({address}) cannot be reached" if address else "cannot be started here"
            raise CannotRun(
                f"The Ray cluster {what}: {first_line(error)}; mend that, or leave --executor out."
            ) from None


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at host:port; ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Flight:
    """A run that has been sent. held: its claim, and what shows it; tries: so far; shown: its last step that was."""

    def __init__(self, spec: RunSpec, held: ExitStack):
        self.spec, self.held = spec, held
        self.tries, self.shown, self.observe = 0, 0, None


class _Driver:
    """Sends runs to the cluster and takes in what comes back. made, lost: run ids, with why."""

    def __init__(self, ray, store: Store, settings: Settings, policy: Policy, reporter: Reporter, jobs, plugins):
        self.ray, self.store, self.settings, self.policy, self.reporter = ray, store, settings, policy, reporter
        self.jobs, self.plugins = jobs, tuple(plugins)
        self.share: Share = share(self._nodes(), settings.device, jobs)
        self.home = _beside(ray.remote(Home)).remote()
        self.work = ray.remote(work).options(max_retries=0, **self.share.options())
        self.flying: dict[Any, _Flight] = {}
        self.made: set[str] = set()
        self.lost: dict[str, str] = {}
        self.begun, self.said = time.monotonic(), False

    def close(self) -> None:
        for flight in self.flying.values():
            flight.held.close()

    def make(self, todo: Sequence[RunSpec], up: Callable[[], bool]) -> None:
        """All of `todo` that no other process makes, those that one gave up included; none is begun once the time is `up`."""
        waiting, elsewhere = deque(todo), []
        try:
            while waiting or elsewhere or self.flying:
                if up():
                    waiting, elsewhere = deque(), []
                while waiting and len(self.flying) < self._most():
                    if not self._send(spec := waiting.popleft()):
                        elsewhere.append(spec)
                        self.reporter.note(f"{spec.label()} is being made by another process; waiting for it.")
                if not waiting:
                    elsewhere = [spec for spec in elsewhere if len(self.flying) >= self._most() or not self._send(spec)]
                self._wait()
        except KeyboardInterrupt:  # ray makes one of what a handler raises
            self.home.stop.remote()
            for done in self.ray.wait(list(self.flying), num_returns=len(self.flying), timeout=interrupts.GRACE)[0]:
                self._landed(done)
            interrupts.end()
            raise

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _most(self) -> int:
        """Runs in flight. Without --jobs more than fit, so that a cluster that can grow sees that it should."""
        return self.jobs or 2 * max(1, self.share.slots(self._nodes()))

    def _send(self, spec: RunSpec) -> bool:
        """Claim a run and send it, if it still has to be made; False where another process is at it."""
        held = ExitStack()
        if not held.enter_context(self.store.claim(spec.run_id)):
            held.close()
            return False
        if not is_pending(self.store, spec, self.policy):  # another process has made it meanwhile
            held.close()
            return True
        if not self.policy.resume:
            for path in places(self.store.checkpoint_path(spec.run_id)):
                path.unlink(missing_ok=True)
        self._fly(_Flight(spec, held))
        return True

    def _fly(self, flight: _Flight) -> None:
        checkpoint = self.store.checkpoint_path(flight.spec.run_id).absolute()
        steering = {key: value for key, value in os.environ.items() if key.startswith("DPFT_")}
        sent = Task(
            flight.spec, self.settings, self.plugins, self.share.threads, read(places(checkpoint)), str(checkpoint),
            os.getcwd(), steering,
        )  # fmt: skip
        flight.tries += 1
        self.flying[self.work.remote(sent, self.home)] = flight

    def _wait(self) -> None:
        """A look at what workers tell, and at what has come back."""
        if not self.flying:
            time.sleep(LOOK)
            return
        done = self.ray.wait(list(self.flying), timeout=LOOK)[0]
        by_id = {flight.spec.run_id: flight for flight in self.flying.values()}
        for run_id, rows in self.ray.get(self.home.take.remote()):
            self.begun = time.monotonic()
            if run_id in by_id:
                self._show(by_id[run_id], rows)
        for one in done:
            self._landed(one)
        running = any(flight.observe for flight in self.flying.values())
        if not running and not self.said and time.monotonic() - self.begun > SILENT:
            self.said = True
            cards = f" and {self.share.cards:.3g} of a card" if self.share.cards else ""
            self.reporter.note(
                f"No run has begun for {SILENT:.0f} seconds: no node of the Ray cluster has {self.share.cpus:g} CPUs{cards} free."
            )

    def _show(self, flight: _Flight, rows: Sequence[dict[str, Any]]) -> None:
        if flight.observe is None:
            flight.observe = flight.held.enter_context(self.reporter.run(flight.spec))
        for row in rows:
            if row["step"] > flight.shown:  # a run that goes on elsewhere takes some steps again
                flight.shown = row["step"]
                flight.observe(row["step"], row)

    def _landed(self, done) -> None:
        """Keep what a worker sends: its checkpoint, and the record unless it was asked to stop."""
        flight = self.flying.pop(done)
        spec, self.begun = flight.spec, time.monotonic()
        try:
            found: Sent = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:  # nothing of dpft ran there
            return self._lose(flight, f"{type(error.cause).__name__}: {first_line(error.cause)}")
        except self.ray.exceptions.RayError as error:
            if flight.tries < TRIES and not interrupts.asked():
                self.reporter.note(
                    f"The worker of {spec.label()} was lost ({type(error).__name__}); it is made elsewhere."
                )
                return self._fly(flight)
            return self._lose(flight, type(error).__name__)
        for text in found.notes:
            self.reporter.note(text)
        keep(places(self.store.checkpoint_path(spec.run_id)), found.kept)
        if found.problem is not None:
            return self._lose(flight, found.problem)
        if found.record is not None:
            self._show(flight, found.curve)
            self.store.write(found.record, found.curve)
            self.made.add(spec.run_id)
        flight.held.close()
        if found.record is not None:
            self.reporter.finished(found.record)

    def _lose(self, flight: _Flight, why: str) -> None:
        self.lost[flight.spec.run_id] = f"{flight.spec.label()}: {why}"
        self.reporter.note(f"{flight.spec.label()} was lost: {why}")
        flight.held.close()


def _beside(actor):
    """An actor on the node of this process, whose disk has the results."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return actor.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))

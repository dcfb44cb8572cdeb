"""One run on a node of a Ray cluster, and what it tells the command that sent it: rows, checkpoints, releases."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput, Interrupted, first_line
from dpft.harness.records.store import atomic
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import journal
from dpft.harness.train.settings import Settings

BETWEEN = 0.5  # seconds between two times that a worker tells and asks
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a worker is sent for one run.

    Attributes:
        threads: that it may use.
        kept: what there is of an earlier try, to go on from: contents of `places`.
        checkpoint: where the driver's node keeps the checkpoint.
        folder: of the driver; relative paths are in it, where a node has it.
        environment: variables of the driver that steer dpft.
    """

    spec: RunSpec
    settings: Settings
    plugins: tuple[str, ...]
    threads: int
    kept: tuple[bytes, ...]
    checkpoint: str
    folder: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Sent:
    """What comes back of one run.

    Attributes:
        record: None where it was stopped, or could not be made.
        kept: contents of its `places`, empty if not there.
        problem: why it could not be made on that node, a sentence.
    """

    record: dict[str, Any] | None
    curve: list[Row]
    kept: tuple[bytes, ...]
    notes: list[str]
    problem: str | None = None


class Home:
    """An actor beside the driver, on the node whose disk has the results."""

    def __init__(self) -> None:
        self._stopped = False
        self._rows: list[tuple[str, list[Row]]] = []

    def stop(self) -> None:
        self._stopped = True

    def tell(self, run_id: str, rows: list[Row]) -> bool:
        """Rows of the curve as they are made; none: the run begins. Whether it is to end."""
        self._rows.append((run_id, rows))
        return self._stopped

    def take(self) -> list[tuple[str, list[Row]]]:
        """What was told since it was last asked."""
        rows, self._rows = self._rows, []
        return rows

    def count(self, path: str) -> None:
        """One release of the run with that checkpoint; on disk when this returns."""
        journal.note(journal.path_of(Path(path)))

    def keep(self, path: str, contents: tuple[bytes, ...]) -> None:
        keep(places(Path(path)), contents)


def work(task: Task, home) -> Sent:
    """Make a run in this process, which ray keeps for others. home: the actor `Home`."""
    os.environ.update(task.environment)
    if os.path.isdir(task.folder):
        os.chdir(task.folder)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{task.spec.run_id}.ckpt"
        keep(places(path), task.kept)
        record, curve, problem = None, [], None
        try:
            record, curve = _execute(task, home, path, lambda text, trouble=True: notes.append(text))
        except Interrupted:
            pass
        except BadInput as error:
            problem = str(error)
        except Exception as error:  # the others go on, and a reason is worth more than a traceback of two machines
            problem = f"{type(error).__name__}: {first_line(error)}"
        return Sent(record, curve, read(places(path)), notes, problem)


def _execute(task: Task, home, path: Path, note: Callable[..., None]):
    import ray
    import torch

    from dpft.harness.runs import registry
    from dpft.harness.train.run import execute
    from dpft.harness.train.settings import pick_device

    for plugin in task.plugins:
        registry.load_plugin(plugin)
    torch.set_num_threads(task.threads)
    settings = dataclasses.replace(task.settings, device=pick_device(task.settings.device))
    told = _Told(home, task, path)
    ray.get(home.tell.remote(task.spec.run_id, []))
    try:
        return execute(task.spec, settings, told, path, note, lambda: ray.get(home.count.remote(task.checkpoint)))
    finally:
        if told.sending is not None:  # else it could come after the record, which takes its place
            ray.wait([told.sending])


class _Told:
    """The observer of a run: every now and then it sends what is new, and asks whether to end."""

    def __init__(self, home, task: Task, path: Path):
        self.home, self.task, self.path = home, task, path
        self.rows: list[Row] = []
        self.last, self.written, self.sending = time.monotonic(), self._stamp(), None

    def __call__(self, step: int, row: Row) -> None:
        import ray

        self.rows.append(row)
        if time.monotonic() - self.last <= BETWEEN:
            return
        self.last = time.monotonic()
        rows, self.rows = self.rows, []
        ended = ray.get(self.home.tell.remote(self.task.spec.run_id, rows))
        self._send(ray)
        if ended:
            raise Interrupted(signal.SIGTERM)

    def _send(self, ray) -> None:
        """A checkpoint that has been written since, unless the one before is still on its way."""
        if self._stamp() == self.written or (self.sending and not ray.wait([self.sending], timeout=0)[0]):
            return
        self.written = self._stamp()
        self.sending = self.home.keep.remote(self.task.checkpoint, read(places(self.path)))

    def _stamp(self) -> int:
        return self.path.stat().st_mtime_ns if self.path.exists() else 0


def places(checkpoint: Path) -> tuple[Path, Path]:
    return checkpoint, journal.path_of(checkpoint)


def read(paths: tuple[Path, Path]) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() if path.exists() else b"" for path in paths)


def keep(paths: tuple[Path, Path], contents: tuple[bytes, ...]) -> None:
    """Write what there is; what is empty was never there. A count of releases is not replaced by a lower one."""
    for path, content in zip(paths, contents, strict=True):
        if len(content) > (journal.releases(path) if path == paths[1] else 0):
            with atomic(path) as temporary:
                temporary.write_bytes(content)

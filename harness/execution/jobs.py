"""Several processes on one suite: each takes the runs that no other has claimed, on its share of the threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from dpft.harness.execution import interrupts

PARENT, NUMBER, THREADS = "DPFT_SIBLING_OF", "DPFT_SIBLING", "OMP_NUM_THREADS"
LOOK, PATIENCE = 0.5, 30.0  # seconds between looks at the parent; that a process may take to leave
Stamps = Mapping[str, tuple[int, ...]]


@contextmanager
def siblings(jobs: int, arguments: Sequence[str], seen: Stamps, table: bool = True) -> Iterator[None]:
    """Start `jobs - 1` more processes of this command, and share the CPU's threads, and what cards there are, among them all.

    arguments: this command's own; seen: the records that it found; table: whether it prints one, which siblings must not. A
    sibling says only what went wrong, ends by itself when nothing is left to claim, and is waited for. When this process is
    interrupted or killed, so are they.
    """
    if jobs == 1:
        yield
        return
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = {THREADS: str(threads), **os.environ, PARENT: str(os.getpid())}
    command = [sys.executable, "-m", "dpft.harness", *arguments, "--jobs", "1", "--quiet", *["--json"] * table]
    others = []
    os.environ.setdefault(THREADS, str(threads))  # torch, when it is imported here, takes its share
    try:
        with interrupts.told_too(others):
            for number in range(1, jobs):
                with tempfile.TemporaryFile("w+") as told:
                    json.dump(seen, told)
                    told.seek(0)
                    own = {**environment, NUMBER: str(number)}
                    others.append(subprocess.Popen(command, env=own, stdin=told, stdout=subprocess.DEVNULL))
            yield
            for other in others:
                other.wait()
    finally:
        _end(others)


def _end(others: list[subprocess.Popen]) -> None:
    for other in (
        others if not interrupts.asked() else ()
    ):  # told already; a second signal would not wait for their step
        other.terminate()
    for other in others:
        try:
            other.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()


def is_sibling() -> bool:
    """Whether another process of the same command started this one."""
    return PARENT in os.environ


def take_card(device: str) -> None:
    """Make this sibling's card the current one, where any may be taken: `jobs` processes take those of the machine in turn."""
    number = int(os.environ.get(NUMBER, "0"))
    if number and device == "cuda":
        import torch

        torch.cuda.set_device(number % torch.cuda.device_count())


def seen(store, run_ids: Sequence[str]) -> Stamps:
    """Stamps of the records that there were when the command was given: now, or what the process that started this one says."""
    if not is_sibling():
        return store.stamps(run_ids)
    threading.Thread(target=leave_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    return {run_id: tuple(stamp) for run_id, stamp in json.load(sys.stdin).items()}


def leave_with(parent: int) -> None:
    """End this process when `parent` has ended without saying so: kill -9 tells nobody."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)

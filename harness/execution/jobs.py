"""Several processes on one suite: each takes the runs that no other has claimed, on its share of the threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

BEGAN, THREADS = "DPFT_JOBS_BEGAN", "OMP_NUM_THREADS"


@contextmanager
def siblings(jobs: int, arguments: list[str], json: bool = True) -> Iterator[None]:
    """Start `jobs - 1` more processes of this command, and share the CPU's threads among them all.

    arguments: this command's own. A sibling says only what went wrong, ends by itself when nothing is left
    to claim, and is waited for. After an interrupt its runs continue from their checkpoints like any other.
    """
    if jobs == 1:
        yield
        return
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = {THREADS: str(threads), **os.environ, BEGAN: repr(time.time())}
    command = [sys.executable, "-m", "dpft.harness", *arguments, "--jobs", "1", "--quiet", *["--json"] * json]
    others = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(jobs - 1)]
    os.environ.setdefault(THREADS, str(threads))  # torch, when it is imported here, takes its share
    try:
        yield
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.terminate()
            other.wait()


def began() -> float:
    """When the command that asks was given, seconds since the epoch: now, or what the sibling that started it says."""
    return float(os.environ.get(BEGAN) or time.time())

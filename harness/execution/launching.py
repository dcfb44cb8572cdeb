"""`dpft run --ranks N`: this process starts the ranks and watches over them; the first makes the runs, the others help it.

A rank is the same command again with its number in the environment, as torchrun has it, which may start the ranks instead. The
first does all that a single process would. The others make the runs that it names, one after another, and write and tell nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpft.harness.errors import BadInput, Interrupted
from dpft.harness.execution import interrupts, jobs
from dpft.harness.train import ranks

LOST = 75  # exit code of a rank that has lost touch with the others; who started them says why
LOOK = 0.05  # seconds between looks at the ranks
LEAVE = 2.0  # seconds that a rank may take to notice that the run is over
POLITE = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def refuse(count: int | None, several: Sequence[str], device: str) -> None:
    """Raises BadInput where several ranks, asked for by `--ranks` or started by torchrun, cannot be. several: options that would
    make several runs at once or want one process."""
    where = ranks.place()
    if where is not None and count not in (None, where.count):
        raise BadInput(f"torchrun started {where.count} ranks, and --ranks says {count}; leave --ranks out.")
    if (where.count if where else count or 1) == 1:
        return
    if several:
        raise BadInput(
            f"--ranks shares each run among processes, which does not go with {several[0]}; take one of them."
        )
    if device.startswith("cuda:"):
        raise BadInput(f"--ranks gives each rank a card of its own; write --device cuda, not {device}.")


def refuse_to_part(count: int | None, wanted: bool, engine: str) -> None:
    """Raises BadInput where the model is to be parted among ranks and cannot be."""
    where = ranks.place()
    if wanted and (where.count if where else count or 1) == 1:
        raise BadInput(
            "--shard-model parts the model among ranks, and this run has one process; add --ranks 2 or more."
        )
    if wanted and engine == "opacus":
        raise BadInput(
            "--shard-model does not go with --engine opacus, which wraps the layers itself; use factored or reference."
        )


@contextmanager
def among(device: str) -> Iterator[bool]:
    """Inside, this process is one of the ranks, where it is one; yields whether it has done all that it is here for."""
    where = ranks.place()
    if where is None:
        yield False
        return
    if where.led:
        threading.Thread(target=jobs.leave_with, args=(os.getppid(),), daemon=True).start()
    with ranks.met(where, _has_card(where, device)) as group:
        if group.first:
            yield False
            group.everyones(None)
        else:
            _serve(group)
            yield True


def _has_card(where: ranks.Place, device: str) -> bool:
    """Whether the ranks have a card each; this rank's is then the current one. Raises BadInput where there are too few."""
    from dpft.harness.train.settings import pick_device

    if pick_device(device) == "cpu":
        return False
    import torch

    if (found := torch.cuda.device_count()) < where.here:
        raise BadInput(
            f"There are {found} cards for {where.here} ranks, and each wants its own; lower --ranks, or use --device cpu."
        )
    torch.cuda.set_device(where.local)
    return True


def _serve(group: ranks.Group) -> None:
    """Make the runs that the first rank names, with it, until there are no more."""
    from dpft.harness.train.run import execute

    while (wanted := group.everyones(None, ranks.FOREVER)[0]) is not None:
        spec, settings, checkpoint_path, compared = wanted
        with interrupts.between_steps(group.everyones) as pausing:
            execute(spec, settings, pausing(lambda step, row: None), checkpoint_path, compared=compared)


def code_of(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def silent() -> bool:
    """Whether this process is a rank that says nothing of how it ends."""
    where = ranks.place()
    return where is not None and where.number > 0


def led() -> bool:
    """Whether it is a rank that `launch` started, which will say how all of them ended."""
    where = ranks.place()
    return where is not None and where.led


def launch(count: int) -> int:
    """Start `count` ranks of this command, on as many shares of the CPU's threads, and wait for them; the first's exit code.

    Raises BadInput where one was lost, and Interrupted where they were interrupted.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    started: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="dpft-ranks-") as folder:
        environment = {jobs.THREADS: str(threads), **os.environ, ranks.MEETING: str(Path(folder, "meeting"))}
        environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        try:
            with interrupts.told_too(started):
                for number in map(str, range(count)):
                    own = environment | {"RANK": number, "LOCAL_RANK": number}
                    out = None if number == "0" else subprocess.DEVNULL
                    command = [sys.executable, "-m", "dpft.harness", *sys.argv[1:]]
                    started.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=out))
                return _verdict(_wait(started))
        finally:
            _end(started, jobs.PATIENCE if interrupts.asked() else 0)


def _wait(started: Sequence[subprocess.Popen]) -> list[int | None]:
    """Wait until all have ended, and see to it once one has that should not have; the codes of those that ended by themselves."""
    codes: list[int | None] = [None]
    while codes[0] is None and not any(codes):
        time.sleep(LOOK)
        codes = [process.poll() for process in started]
    first, told = started[0], False
    if codes[0] is None:  # one that helps has ended; unless it was killed, the first has heard why or ends alike
        told = not _ended(first, LEAVE if min(filter(None, codes)) < 0 else jobs.PATIENCE)
        if told:
            first.terminate()  # it ends its step, unless that takes long
            _ended(first, interrupts.GRACE + LEAVE)
    limit = time.monotonic() + LEAVE
    while any(process.poll() is None for process in started) and time.monotonic() < limit:
        time.sleep(LOOK)
    codes = [process.poll() for process in started]
    return [None, *codes[1:]] if told else codes


def _verdict(codes: Sequence[int | None]) -> int:
    """The exit code of the command. codes: of all ranks; None: it was ended. Raises BadInput where a rank was lost."""
    if codes[0] in POLITE:
        raise Interrupted(codes[0] - 128)
    if codes[0] is not None and codes[0] >= 0 and codes[0] != LOST:
        return codes[0]
    gone = [(code, number) for number, code in enumerate(codes) if code not in (None, 0, LOST)]
    code, number = min(gone, default=(LOST, 0))  # a signal's code is negative: the others followed
    how = "lost touch with the others" if code == LOST else f"ended with exit code {code}"
    if code < 0 or code in POLITE:
        how = f"was ended by {signal.Signals(-code if code < 0 else code - 128).name}"
    raise BadInput(
        f"Rank {number} {how}, so all {len(codes)} ended; finished runs are kept, the same command continues."
    )


def _ended(process: subprocess.Popen, within: float) -> bool:
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(started: Sequence[subprocess.Popen], patience: float) -> None:
    """Leave none behind; the first alone has something to finish."""
    if started and patience:
        _ended(started[0], patience)
    for process in started:
        process.kill()
        process.wait()

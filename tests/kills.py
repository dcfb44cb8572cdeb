"""Kill a small suite at random moments, go on until it is done, and hold every record against an undisturbed run.

    python tests/kills.py --kills 500 --terms 100 --seed 1

Prints the table of docs/faults.md; exit code 1 where anything was lost, changed or left behind. Linux (it looks into /proc).
The commands are real (`dpft run`, checkpoints after every step), started by fork, as importing torch takes seconds.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a fork must find no threads

import hashlib
import importlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

STEPS = 30
SUITE = f"""
[kills.base]
task = "low-rank"
steps = {STEPS}
batch_size = 256
epsilon = 4.0
eval_every = 10
eval_examples = 64

[[kills.arms]]
method = ["dp-adam", "dp-grape", "non-private"]

[[kills.arms]]
method = "dp-sgd"
clipping = "quantile"
decoder = "rmt"
"""
RUN = ["--checkpoint-every", "0", "--json"]
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
MOMENTS = {1: 1.6, 2: 4.0}
LONGEST = 60.0  # seconds after which a command that was told to leave, or its siblings, count as left behind


class Commands:
    """`dpft run` of the suite in `folder`, in children; stderr of all of them in one file."""

    def __init__(self, base: Path):
        self.suite, self.log = base / "suite.toml", base / "stderr"
        self.suite.write_text(SUITE)

    def undisturbed(self, folder: Path) -> None:
        """Make the whole suite, and import here what it imported, so that the commands that are killed begin at once."""
        modules = self.suite.with_name("modules")

        def make() -> None:
            with suppress(SystemExit):
                self._main(self._arguments(folder, 1))
            modules.write_text(json.dumps([*sys.modules, "polars"]))

        if ended(forked(make), 600) != 0 or len(digests(folder)) == 0:
            raise SystemExit(f"The undisturbed run failed:\n{self.log.read_text()}")
        for name in json.loads(modules.read_text()):
            with suppress(Exception):
                importlib.import_module(name)

    def start(self, folder: Path, jobs: int) -> int:
        return forked(lambda: self._main(self._arguments(folder, jobs)))

    def _arguments(self, folder: Path, jobs: int) -> list[str]:
        return ["run", str(self.suite), "--results", str(folder), "--jobs", str(jobs), *RUN]

    def _main(self, arguments: list[str]) -> int:
        from dpft.harness import cli

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = ["dpft", *arguments]
        cli.main()
        return 0


def forked(work: Callable[[], int | None]) -> int:
    """A child, leader of its own group of processes, that ends with the code of `work`; its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        code = work() or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def ended(child: int, within: float, clock: Callable[[int], float] = lambda child: time.monotonic()) -> int | None:
    """Its exit code (negative: the signal that ended it), or None where it has not ended `within` seconds of the clock."""
    deadline = clock(child) + within
    while clock(child) < deadline:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def worked(child: int) -> float:
    """Seconds that it has computed: a moment of a command's life is the same on a busy machine."""
    user, system = Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def alive(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, theirs = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(theirs) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def progress(folder: Path) -> dict[str, float]:
    """Run id -> steps that are safe on disk; infinite where the run is done."""
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.ckpt"):
        with safe_open(path, framework="pt") as file:
            found[path.stem] = json.loads(file.metadata()["state"])["progress"]["step"]
    return found | {path.stem: float("inf") for path in folder.glob("*.json")}


def digests(folder: Path) -> dict[str, str]:
    """Of every record and of its curve."""
    paths = [path for record in folder.glob("*.json") for path in (record, record.with_suffix(".parquet"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def compare(folder: Path, undisturbed: Path) -> int:
    """How many runs differ in anything but times and place, of record or curve."""
    from dpft.harness.records.store import Store

    def kept(store: Store, record: Mapping) -> tuple:
        same = {key: value for key, value in record.items() if key not in ("cost", "provenance")}
        return same, store.curve(record["run_id"]).rows(named=True)

    both = [{r["run_id"]: kept(store, r) for r in store.each()} for store in (Store(folder), Store(undisturbed))]
    return sum(both[0].get(run_id) != one for run_id, one in both[1].items())


def signals(kills: int, terms: int, rng: random.Random) -> list[tuple[str, int]]:
    """(signal, jobs) in random order; one of each kind in ten goes to a command with two processes."""
    both = (("kill -9", kills), ("SIGTERM", terms))
    found = [(name, 2 if index % 10 == 0 else 1) for name, count in both for index in range(count)]
    rng.shuffle(found)
    return found


def study(kills: int, terms: int, seed: int, base: Path) -> tuple[dict[str, Counter], list[str]]:
    """Counts by kind of signal, and a sentence for everything that went wrong."""
    commands, rng = Commands(base), random.Random(seed)
    wrong: list[str] = []
    commands.undisturbed(base / "undisturbed")
    runs = len(digests(base / "undisturbed")) // 2
    counts = {name: Counter() for name in SIGNALS}
    finished, folder = 0, base / "0"
    todo = signals(kills, terms, rng)
    while todo:
        name, jobs = todo[-1]
        count = counts[name]
        before, safe = digests(folder), progress(folder)
        child = commands.start(folder, jobs)
        code = ended(child, rng.uniform(0, MOMENTS[jobs]), worked)
        told = time.monotonic()
        if code is None:
            os.kill(child, SIGNALS[name])
            code = ended(child, LONGEST)
        if code != 0:
            todo.pop()
            count["sent"] += 1
            count["to two processes"] += jobs == 2
            while alive(child) and time.monotonic() - told < LONGEST:
                time.sleep(0.01)
            count["seconds"] = max(count["seconds"], time.monotonic() - told)
            if left := alive(child):
                wrong.append(f"{len(left)} processes lived on after {name}.")
                os.killpg(child, signal.SIGKILL)
            if code not in ((-9,) if name == "kill -9" else (143, -15)):  # -15: before dpft had begun
                wrong.append(f"{name} was answered by exit code {code}.")
            halves = list(folder.glob(".*.tmp"))
            count["left half a file"] += bool(halves)
            count["MiB"] += sum(path.stat().st_size for half in halves for path in half.iterdir()) / 2**20
            if name == "SIGTERM" and halves:
                wrong.append(f"{name} left {halves[0].name}.")
            now = progress(folder)
            count["before a step was safe"] += now == safe
            if lost := [run for run in safe if now.get(run, -1) < safe[run]]:
                wrong.append(f"{name} took run {lost[0]} back from step {safe[lost[0]]} to {now.get(lost[0])}.")
        after = digests(folder)
        if changed := [file for file in before if after.get(file) != before[file]]:
            wrong.append(f"{changed[0]} was changed or lost after it was finished.")
        if code == 0:  # the suite is done, now or in an earlier attempt
            finished += 1
            wrong += settled(folder, base / "undisturbed")
            folder = base / str(finished)
    if ended(commands.start(folder, 1), 600) != 0:
        wrong.append(f"The last command failed:\n{commands.log.read_text()[-2000:]}")
    wrong += settled(folder, base / "undisturbed")
    finished += 1
    log = commands.log.read_text()
    totals = Counter(
        suites=finished,
        records=finished * runs,
        resumed=log.count("continued from step"),
        tracebacks=log.count("Traceback"),
    )
    if totals["tracebacks"]:
        wrong.append(log[log.index("Traceback") :][:2000])
    return counts | {"all": totals}, wrong


def settled(folder: Path, undisturbed: Path) -> Iterator[str]:
    """What is wrong with a suite that is done."""
    names = {path.name for path in folder.iterdir()} - {".locks"}
    if names != {path.name for path in undisturbed.iterdir()} - {".locks"}:
        yield f"Files of {folder}: {sorted(names)}."
    if code := ended(forked(lambda: compare(folder, undisturbed)), 60):
        yield f"{code} records differ from the undisturbed ones."


def table(counts: dict[str, Counter]) -> str:
    rows = {
        "signals, at random moments": "{sent}",
        "of these to a command with `--jobs 2`": "{to two processes}",
        "before anything new was on disk": "{before a step was safe}",
        "left half a file, removed by the next command": "{left half a file} ({MiB:.1f} MiB)",
        "longest until all processes were gone": "{seconds:.1f} s",
    }
    text = ["| | kill -9 | SIGTERM |", "|---|---|---|"]
    for said, pattern in rows.items():
        text.append(f"| {said} | {' | '.join(pattern.format(**numbers(counts[name])) for name in SIGNALS)} |")
    every = counts["all"]
    text.append("")
    text.append(
        f"{every['resumed']} runs went on from a checkpoint; {every['suites']} suites were finished, and their "
        f"{every['records']} records and curves held against undisturbed ones."
    )
    return "\n".join(text)


def numbers(count: Counter) -> dict[str, float]:
    names = ("sent", "to two processes", "before a step was safe", "left half a file", "MiB", "seconds")
    return {name: count[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--terms", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as base:
        counts, wrong = study(given.kills, given.terms, given.seed, Path(base))
    print(table(counts))
    print(f"\n{len(wrong)} things went wrong." if wrong else "\nNothing was lost, changed or left behind.")
    for one in wrong[:20]:
        print(one)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

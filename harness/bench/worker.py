"""The fresh process: `python -m dpft.harness.bench.worker JOB PARENT` prints one JSON result as the last line of stdout."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpft.harness.bench import floor, peers, workload
from dpft.harness.bench.cells import BASELINE, WARMUP, Job
from dpft.harness.errors import BadInput
from dpft.harness.train.settings import exact_fp32, keep_freed_memory

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Measure the job in argv, for the process PARENT; whatever goes wrong is a result with a status and a reason."""
    _end_with(int(sys.argv[2]))
    _volunteer()
    print(json.dumps(run(Job.from_json(sys.argv[1]))), flush=True)


def run(job: Job) -> dict[str, Any]:
    """The result of one job. status: `done`, `skipped`, `out of memory`, `failed` or `bad input`."""
    keep_freed_memory()  # for every engine: it is how `dpft run` runs
    exact_fp32()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.manual_seed(0)
    try:
        if job.plugins:
            from dpft.harness.runs.registry import load_plugin

            for plugin in job.plugins:
                load_plugin(plugin)
        if not job.whole:
            model, source = workload.build(job)
    except BadInput as error:
        return {"status": "bad input", "reason": str(error)}
    try:
        return {"status": "done", "reason": None, **(_waited(job) if job.whole else measure(job, model, source))}
    except BadInput as error:
        return {"status": "bad input", "reason": str(error)}
    except peers.Skipped as error:
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            return {"status": "out of memory", "reason": text}
        return {"status": "failed", "reason": f"{type(error).__name__}: {text}"}


def _waited(job: Job) -> dict[str, Any]:
    """A whole run; `median_s` is its training."""
    from dpft.harness.bench import whole

    before = memory(job.device)[0]
    waited = whole.run(job)
    return {
        "seconds": [waited.train],
        "median_s": waited.train,
        "waited": asdict(waited),
        "before_bytes": before,
        "peak_bytes": memory(job.device)[1],
        "threads": torch.get_num_threads(),
        "phases": None,
    }


def measure(job: Job, model: torch.nn.Module, source: workload.Source) -> dict[str, Any]:
    """Warm up, time the steps, read the peak; the baseline also counts the floor, after everything else."""
    before = memory(job.device)[0]
    step = peers.step_of(job, model)
    for _ in range(WARMUP):
        step(source(0))
    floor.wait(job.device)
    clock = getattr(step, "clock", None)
    if clock is not None:
        clock.take()  # of the warm-up
    seconds = []
    for index in range(1, job.steps + 1):
        start = time.perf_counter()
        step(source(index))
        floor.wait(job.device)
        seconds.append(time.perf_counter() - start)
    result = {
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "before_bytes": before,
        "peak_bytes": memory(job.device)[1],
        "threads": torch.get_num_threads(),
        "phases": None if clock is None else {name: s / job.steps for name, s in clock.take().items()},
    }
    if job.engine == BASELINE and job.task is None:
        result["floor"] = _floor(job, model, source(0)[0])
    return result


def _floor(job: Job, model: torch.nn.Module, batch: workload.Batch) -> dict[str, float]:
    loss = workload.loss_of(job)
    work = floor.count(model, lambda one: loss(model, one), batch)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    rate = floor.matmul_rate(work.shapes, job.batch_size, job.device, dtype)
    return {
        "flops_per_example": work.flops,
        "gram_flops_per_example": work.gram_flops,
        "flops_per_second": rate,
        "non_private_s": job.examples * work.flops / rate,
        "private_s": job.examples * (work.flops + work.gram_flops) / rate,
    }


def memory(device: str) -> tuple[int, int]:
    """(bytes now, peak bytes): of the CUDA allocator, or resident memory of this process.

    The peak is the kernel's VmHWM. `ru_maxrss` would also count the program that started this one: it survives exec.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return kib["VmRSS"] * 1024, kib["VmHWM"] * 1024
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak


def _end_with(parent: int) -> None:
    """Have the kernel (Linux) end this process with the one that asked for it, however that one ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("The process that asked for this measurement is gone.")


def _volunteer() -> None:
    """Should memory run out, the kernel is to end this process and not the user's others."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()

"""What a user waits for: whole runs on real sentences, by dpft and as its peers' manuals say; loading and evaluation apart.

Opacus runs through its PrivacyEngine and BatchMemoryManager; plain PyTorch has a DataLoader and no privacy. Both pad a microbatch
of random examples to its longest one, as transformers' collators do; dpft puts examples of like length together.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from dpft.harness.bench.cells import Job
from dpft.harness.bench.workload import loss_of, placed
from dpft.harness.errors import BadInput
from dpft.tasks.classification import logits

EPSILON = 1.0  # small, so that few steps of few examples can be certified, too; noise takes the same time at any


@dataclass(frozen=True)
class Waited:
    """Seconds of one run.

    Attributes:
        load: from the task's name to the first step, without imports.
        train: all steps, with what belongs to them (batches, checks, bookkeeping).
        evaluate: on the whole validation split.
        metric: accuracy there; it shows that something was trained, and is no comparison.
    """

    load: float
    train: float
    evaluate: float
    metric: float


def run(job: Job) -> Waited:
    """The run that the job names: `steps` steps of `examples` sentences each. Raises BadInput, and what the engine raises."""
    return _dpft(job) if job.engine == "factored" else _peer(job)


def _dpft(job: Job) -> Waited:
    """`dpft run --method dp-adam`, by the code that makes every run."""
    from dpft.harness.runs.plan import plan
    from dpft.harness.runs.resolve import resolve
    from dpft.harness.train import loop
    from dpft.harness.train import run as runs
    from dpft.harness.train.parts import Run
    from dpft.harness.train.settings import Settings

    begin = time.perf_counter()
    settings = Settings(_folder(job), device=job.device, max_tokens=job.batch_size * job.length)
    spec = resolve(
        {
            "task": job.task,
            "model": job.model,
            "method": "dp-adam",
            "epsilon": EPSILON,
            "steps": job.steps,
            "batch_size": job.examples,
            "max_length": job.length,
            "precision": job.precision,
            "eval_every": job.steps,
            "eval_examples": 1,
        }
    )
    setup = runs.build(
        spec, settings, plan(spec, settings.data_dir, lambda: runs.release_dimension(spec, settings)), None
    )
    made, ready = Run(), time.perf_counter()
    try:
        loop.train(setup, made, lambda step, row: None)
    finally:
        setup.engine.close()
        setup.mechanism.close()
    end = time.perf_counter()
    evaluated = made.cost.eval_seconds
    return Waited(ready - begin, end - ready - evaluated, evaluated, float(made.outcome.final))


def _peer(job: Job) -> Waited:
    from dpft.harness.runs import registry
    from dpft.tasks.base import ModelSpec

    begin = time.perf_counter()
    task = registry.task(job.task)()
    spec = ModelSpec(job.model, "mean", job.length)
    prepared = task.prepare(task.load(_folder(job)), spec, torch.Generator().manual_seed(0))
    if job.examples > len(prepared.train):
        raise BadInput(f"{job.task} has only {len(prepared.train)} examples; lower --logical from {job.examples}.")
    model = prepared.model.to(job.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    steps = {
        "non-private": _plain,
        "opacus-hooks": partial(_opacus, "hooks"),
        "opacus-ghost": partial(_opacus, "ghost"),
    }
    step = steps[job.engine](job, model, optimizer, prepared)
    ready = time.perf_counter()
    done = 0
    while done < job.steps:  # an epoch may be shorter
        for _ in step():
            done += 1
            if done == job.steps:
                break
    trained = time.perf_counter()
    right = _right(job, task, model, prepared)
    return Waited(ready - begin, trained - ready, time.perf_counter() - trained, right / len(prepared.validation))


def _plain(job: Job, model: nn.Module, optimizer, prepared) -> Callable[[], Iterator[None]]:
    """An epoch of plain training in microbatches, a value for each step."""
    sampler = RandomSampler(range(len(prepared.train)), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(prepared.train, job.batch_size, sampler=sampler, collate_fn=prepared.collate)
    loss = loss_of(job)

    def epoch():
        seen = 0
        for batch in loader:
            (loss(model, placed(job.device, batch)).sum() / job.examples).backward()
            seen += job.batch_size
            if seen >= job.examples:
                optimizer.step()
                optimizer.zero_grad()
                seen = 0
                yield

    return epoch


def _opacus(mode: str, job: Job, model: nn.Module, optimizer, prepared) -> Callable[[], Iterator[None]]:
    """An epoch of Opacus 1.6 in microbatches of Poisson batches, a value for each step."""
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(prepared.train, job.examples, collate_fn=prepared.collate),
        noise_multiplier=job.noise_multiplier,
        max_grad_norm=job.clip_norm,
        grad_sample_mode=mode,
    )
    private, optimizer, criterion, loader = made if len(made) == 4 else (*made[:2], nn.CrossEntropyLoss(), made[2])

    def epoch():
        manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=job.batch_size, optimizer=optimizer)
        with manager as microbatches:
            for batch in microbatches:
                batch = placed(job.device, batch)
                with torch.autocast(torch.device(job.device).type, torch.bfloat16, enabled=job.precision == "bf16"):
                    loss = criterion(logits(private, batch), batch["labels"])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if not optimizer._is_last_step_skipped:  # the last microbatch of its batch
                    yield

    return epoch


@torch.no_grad()
def _right(job: Job, task, model: nn.Module, prepared) -> int:
    """How many validation examples are classified rightly, in microbatches in their order."""
    model.eval()
    right = 0
    for batch in DataLoader(prepared.validation, 2 * job.batch_size, collate_fn=prepared.collate):
        found, labels = task.predict(model, placed(job.device, batch))
        right += sum(map(operator.eq, found, labels))
    return right


def _folder(job: Job) -> Path | None:
    return None if job.data_dir is None else Path(job.data_dir)

"""One function per engine: it takes (job, model) and returns `step(microbatches)`, one whole training step.

A step that can tell its phases apart has a `clock`.
Every engine ends in the same fused AdamW. The peer is called as its own documentation says: Opacus 1.6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dpft.harness.bench.cells import Job
from dpft.harness.bench.workload import Batch, loss_of
from dpft.harness.engine import NAMES, engine_class
from dpft.harness.engine.base import Engine, Loss
from dpft.harness.probes import Clock
from dpft.harness.runs.releases import kind_starts
from dpft.harness.train import public_rows
from dpft.tasks.classification import logits

Step = Callable[[list[Batch]], None]


class Skipped(Exception):
    """The method says it cannot run on this model; the message is its reason."""


def step_of(job: Job, model: nn.Module) -> Step:
    """The step of the job's engine on `model`, which it may wrap or freeze. Raises what the engine raises, and Skipped."""
    if job.method is not None:
        return _method(job, model)
    if job.training == "lora":
        model = _prepared("dp-lora", model)[2]
    if job.engine in NAMES:
        return dpft_step(job, model)
    return PEERS[job.engine](job, model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(trainable(model).values())
    if job.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=job.lr)
    return torch.optim.AdamW(parameters, lr=job.lr, fused=True)


def non_private_step(job: Job, model: nn.Module, loss: Loss | None = None) -> Step:
    optimizer, clock = _optimizer(job, model), Clock(torch.device(job.device))
    loss = loss or loss_of(job)

    def step(batches):
        for batch in batches:
            with clock("forward"):
                total = loss(model, batch).sum() / job.examples
            with clock("backward"):
                total.backward()
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step.clock = clock
    return step


def _prepared(name: str, model: nn.Module, examples: int = 1, decoder: str | None = None):
    """(spec, method, model as it trains it). Raises Skipped."""
    from dpft.harness.runs import registry
    from dpft.harness.runs.resolve import resolve

    spec = resolve({"task": "sentences", "method": name, "batch_size": examples, "decoder": decoder})
    method = registry.instance(spec)
    reason = method.skip(model)
    if max(kind_starts(method)) > 1:
        reason = "has kinds of steps that differ; see the times in a run's record"
    if public_rows.needed(method):
        reason = "learns from public data of a task, which a bench has not; see the times in a run's record"
    if reason is not None:
        raise Skipped(reason)
    device = next(model.parameters()).device
    return spec, method, method.prepare(model, torch.Generator().manual_seed(3)).to(device)


def _method(job: Job, model: nn.Module) -> Step:
    """A registered method with its own defaults, engine, encodings, decoder and optimizer."""
    head = frozenset(model.head_parameters)
    spec, method, model = _prepared(job.method, model, job.examples, job.decoder)
    method.decoder.setup(model, trainable(model), head, spec)
    return dpft_step(job, model, method, method.optimizer(trainable(model), head, spec))


def dpft_step(
    job: Job,
    model: nn.Module,
    method=None,
    optimizer: torch.optim.Optimizer | None = None,
    kind: type[Engine] | None = None,
    loss: Loss | None = None,
) -> Step:
    """dpft's own path, by the code that answers a run's questions; by default gradients, decoded to the noisy mean.

    kind, loss: in place of the job's engine and of the cross entropy of its classes.
    """
    from dpft.harness.engine.base import ForwardEngine
    from dpft.harness.query import updates
    from dpft.harness.query.queries import Gradients
    from dpft.harness.runs.releases import shares
    from dpft.harness.train.answer import Answers
    from dpft.harness.train.core import Core
    from dpft.harness.train.mechanism import GaussianMechanism
    from dpft.harness.train.noise import source
    from dpft.methods.base import Method

    method, optimizer = method or Method(), optimizer or _optimizer(job, model)
    parameters = trainable(model)
    kind = kind or (engine_class(job.engine) if Gradients in method.asks else ForwardEngine)
    clock = Clock(torch.device(job.device))
    engine = kind(model, loss or loss_of(job), parameters, clock)
    with unset_fake_temporarily():  # a generator has a seed also where tensors have only shapes
        mechanism = GaussianMechanism(job.noise_multiplier, job.clip_norm, job.examples, source(job.device, "bench"))
    if method.rule.adaptive:
        method.rule.start(method.spec, job.noise_multiplier, engine.members, model)
    core = Core(model, parameters, engine, mechanism, method.rule, job.clip_norm, clock)
    count = 0

    def step(batches):
        nonlocal count
        with clock("decode"):
            update = method.step(Answers(core, shares(method, count), lambda: batches), count)
        with clock("optimizer"):
            updates.apply(optimizer, parameters, update)
        count += 1

    step.clock = clock
    return step


def _opacus_hooks(job: Job, model: nn.Module) -> Step:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped, loss = GradSampleModule(model), loss_of(job)
    optimizer = DPOptimizer(_optimizer(job, model), **_opacus_settings(job))
    return _opacus_step(optimizer, lambda batch: loss(wrapped, batch).mean())


def _opacus_ghost(job: Job, model: nn.Module) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=job.clip_norm)
    optimizer = DPOptimizerFastGradientClipping(_optimizer(job, model), **_opacus_settings(job))
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    kind = torch.device(job.device).type

    def loss(batch):
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
            return criterion(logits(wrapped, batch), batch["labels"])

    return _opacus_step(optimizer, loss)


def _opacus_settings(job: Job) -> dict:
    return {
        "noise_multiplier": job.noise_multiplier,
        "max_grad_norm": job.clip_norm,
        "expected_batch_size": job.examples,
    }


def _opacus_step(optimizer, loss: Callable[[Batch], object]) -> Step:
    """Noise and the inner optimizer only after the last microbatch, as Opacus's BatchMemoryManager arranges it."""

    def step(batches):
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            optimizer.signal_skip_step(do_skip=left > 0)
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


PEERS: dict[str, Callable[[Job, nn.Module], Step]] = {
    "non-private": non_private_step,
    "opacus-hooks": _opacus_hooks,
    "opacus-ghost": _opacus_ghost,
}

"""What the engines are measured on: a task model and the microbatches of every step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from dpft.harness.bench.cells import Job
from dpft.harness.errors import BadInput
from dpft.harness.train.sampling import buckets
from dpft.tasks import models
from dpft.tasks.classification import logits
from dpft.tasks.tokens import Collator, Fields

Batch = dict[str, torch.Tensor]
Source = Callable[[int], list[Batch]]  # step -> its microbatches
ROWS = 4096  # real sentences that are tokenised
CLASSES = 2


def build(job: Job) -> tuple[nn.Module, Source]:
    """(model with its head, microbatches by step), on the device. Raises BadInput where model and cell do not fit."""
    model, source = _sentences(job) if job.task else _random_tokens(job)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in model.head_parameters:  # a zero head would send zeros through the whole backward pass
            model.get_parameter(name).normal_(0, 0.02, generator=generator)
    return model.to(job.device), source


def loss_of(job: Job) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """Cross entropy of each example, [batch], under autocast for bf16."""
    kind = torch.device(job.device).type

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
            return functional.cross_entropy(logits(model, batch), batch["labels"], reduction="none")

    return loss


def _random_tokens(job: Job) -> tuple[nn.Module, Source]:
    """The same random microbatch again and again: all rows are `length` tokens long, none is padding."""
    if job.examples % job.batch_size:
        raise BadInput(
            f"--logical {job.logical} is not a multiple of the {job.batch_size} examples of {job.cell.name}."
        )
    model, _ = models.load_model(models.resolve(job.model), "mean", CLASSES, torch.Generator().manual_seed(0))
    fields = Fields.of(model, model.config)  # the configuration has the pad_token_id for which a tokenizer is asked
    fields.checked_length(job.length, job.model)
    generator = torch.Generator().manual_seed(1)
    shape = (job.batch_size, job.length)
    ids = torch.randint(model.config.vocab_size - 1, shape, generator=generator)
    ids += ids >= fields.pad_id
    labels = torch.randint(CLASSES, shape[:1], generator=generator)
    examples = [{"input_ids": row, "labels": int(y)} for row, y in zip(ids.numpy(), labels, strict=True)]
    batch = placed(job.device, Collator(fields)(examples))
    return model, lambda step: [batch] * (job.examples // job.batch_size)


def _sentences(job: Job) -> tuple[nn.Module, Source]:
    """Real sentences, drawn anew for every step; a microbatch has at most batch_size * length padded tokens."""
    from dpft.harness.runs import registry
    from dpft.tasks.base import ModelSpec
    from dpft.tasks.classification import TextClassification

    task = registry.task(job.task)
    if not issubclass(task, TextClassification):
        raise BadInput(f"--text needs a classification task, not {job.task}; take sentences or sst2.")
    data = task().load(None if job.data_dir is None else Path(job.data_dir))
    rows = random.Random(0).sample(range(len(data.train)), min(ROWS, len(data.train)))
    data = dataclasses.replace(data, train=[data.train[i] for i in rows], validation=[])
    prepared = task().prepare(data, ModelSpec(job.model, "mean", job.length), torch.Generator().manual_seed(0))
    if job.examples > len(rows):
        raise BadInput(f"{job.task} has only {len(rows)} sentences; lower --logical from {job.examples}.")

    def source(step: int) -> list[Batch]:
        chosen = random.Random(step).sample(range(len(rows)), job.examples)
        longest = max(chosen, key=lambda i: prepared.train_lengths[i])
        lengths = prepared.train_lengths if job.bucketed else dict.fromkeys(chosen, prepared.train_lengths[longest])
        batches = []
        for micro in buckets(chosen, lengths, job.batch_size * job.length):
            # the longest example comes along so that it sets the padded length, and goes again
            extra = [] if job.bucketed else [longest]
            batch = prepared.collate([prepared.train[i] for i in micro + extra])
            batches.append(placed(job.device, {name: tensor[: len(micro)] for name, tensor in batch.items()}))
        return batches

    return prepared.model, source


def placed(device: str, batch: Batch) -> Batch:
    """On the device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}

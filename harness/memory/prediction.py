"""One step of a real engine on tensors without values: what it would hold, and when it would hold the most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from dpft.harness.bench.cells import Job
from dpft.harness.bench.peers import dpft_step, non_private_step, trainable
from dpft.harness.errors import BadInput, CannotRun, unknown
from dpft.harness.memory import skeletons
from dpft.harness.memory.engines import Materialised, TwoPasses
from dpft.harness.probes import LiveBytes
from dpft.harness.query.encoding import IDENTITY
from dpft.harness.query.preview import first_questions
from dpft.harness.query.queries import Gradients
from dpft.harness.runs import registry
from dpft.harness.runs.releases import kind_starts
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import public_rows
from dpft.harness.train.core import encodings_of

ENGINES = {"materialised": Materialised, "ghost": TwoPasses}
INFERENCE = "inference"
ROWS = ("non-private", *ENGINES, INFERENCE)  # beside the registered methods
CATEGORIES = (
    "parameters",
    "optimizer_state",
    "gradients",
    "per_example",
    "activations",
    "backward",
    "noise",
    "update",
    "other",
)


@dataclass(frozen=True)
class Question:
    """What is asked: the memory of one step.

    method: a registered method, or one of ROWS, which train everything with AdamW (`inference`: nothing); batch: examples at
    once; length: tokens (images have a size of their own); options: settings of the method, its decoder and its run, as in a
    RunSpec; logits: those of a language model in `pieces` or `whole`, as the engines of ENGINES, which stand for others' code,
    always have them.
    """

    model: str
    method: str
    batch: int
    length: int = 128
    precision: str = "fp32"
    head: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    logits: str = "pieces"


@dataclass(frozen=True)
class Answer:
    """peak: live bytes by category at the moment of the largest total; parameters, trainable: numbers of the model."""

    peak: dict[str, int]
    parameters: int
    trainable: int

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.peak.values())


def predict(question: Question) -> Answer:
    """The peak of two steps on fake tensors: nothing is allocated and nothing computed.

    The second step has the optimizer's state. Raises BadInput for what is not known, CannotRun where the engine refuses.
    """
    try:
        return _peak(question, FakeTensorMode(allow_non_fake_inputs=True))
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise CannotRun(
            f"What {question.method} holds depends on values (spectra or counts, say), which a prediction has not; take its "
            "method without that decoder, or see peak_bytes in the record of a run."
        ) from None


def measure(question: Question) -> Answer:
    """The same of two real steps, on random weights: what `predict` is tested against."""
    return _peak(question, None)


def _peak(question: Question, mode: FakeTensorMode | None) -> Answer:
    if question.batch < 1 or question.length < 2:
        raise BadInput("A batch has at least 1 example of at least 2 tokens; correct --batch or --length.")
    inside = contextlib.nullcontext() if mode is None else mode
    with inside:
        logits = "whole" if question.method in ENGINES else question.logits
        model = skeletons.build(question.model, question.head, logits)
        batch = skeletons.batch(model, question.batch, question.length)
    if mode is None:  # what was allocated may be anything, and a step that is not finite ends
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
    step, model, shapes = _step(question, model, mode)
    live = LiveBytes(getattr(step, "clock", _Idle()), shapes)
    live.label("parameters", model.parameters())
    live.label("parameters", model.buffers())
    with inside, live:
        step([batch])
        live.label("optimizer_state", getattr(step, "kept", dict)().values())  # moments that the method holds itself
        step([batch])
    names = {name: p.numel() for name, p in model.named_parameters()}
    return Answer(
        {category: live.peak[category] for category in CATEGORIES if live.peak.get(category)},
        sum(names.values()),
        sum(names[name] for name in trainable(model)),
    )


def _step(question: Question, model: nn.Module, mode: FakeTensorMode | None):
    """(step, the model as it is trained, categories of shapes). Outside of the fake mode: seeds are drawn here."""
    job = Job(question.method, "factored", question.batch, question.length, precision=question.precision)
    loss = skeletons.loss(question.precision)
    if question.method in ROWS:
        shapes = _shapes(trainable(model), {}, question.batch)
        if question.method == INFERENCE:
            return _inference(model, loss), model, {}
        if question.method == "non-private":
            return non_private_step(job, model, loss), model, shapes
        return dpft_step(job, model, kind=ENGINES[question.method], loss=loss), model, shapes
    if question.method not in registry.methods():
        raise unknown("method", question.method, {*registry.methods(), *ROWS})
    spec = resolve({"task": "sentences", "method": question.method, "batch_size": question.batch, **question.options})
    method = registry.instance(spec)
    if spec.bands > 1:
        raise CannotRun(
            "Noise that is correlated over steps holds bands - 1 more sums of gradients, which a prediction leaves out; take it "
            "without bands and add them."
        )
    if max(kind_starts(method)) > 1:
        raise CannotRun(
            f"{question.method} has kinds of steps, each with a memory of its own; see peak_bytes in the record of a run."
        )
    if public_rows.needed(method):
        who = question.method if method.needs_public else f"Clipping {spec.clipping}"
        raise CannotRun(
            f"{who} learns from public data of a task, which a prediction has not; see peak_bytes in the record of a "
            "run."
        )
    reason = method.skip(model)
    if reason is not None:
        raise BadInput(reason)
    head = frozenset(model.head_parameters)
    model = method.prepare(model, torch.Generator().manual_seed(0))
    if mode is not None:
        _fake(model, mode)  # what the method has added
    parameters = trainable(model)
    method.decoder.setup(model, parameters, head, spec)
    asked = [query for query in first_questions(method, 0).values() if isinstance(query, Gradients)]
    shapes = _shapes(parameters, encodings_of(asked[0], parameters), question.batch) if asked else {}
    optimizer = method.optimizer(parameters, head, spec)
    step = dpft_step(job, model, method, optimizer, loss=loss)
    step.kept = method.state_dict
    return step, model, shapes


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    made: dict[int, nn.Parameter] = {}  # what modules share they go on sharing
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or isinstance(p, FakeTensor):
                continue
            if id(p) not in made:
                with mode:  # made of fakes, a parameter has no device
                    data = torch.empty(p.shape, dtype=p.dtype) if p.is_meta else mode.from_tensor(p.data)
                made[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
            module._parameters[name] = made[id(p)]


def _shapes(parameters: dict[str, nn.Parameter], encodings: dict[str, Any], batch: int) -> dict[tuple[int, ...], str]:
    """Categories of tensors that are told by their shapes: sums of gradients, and materialised ones."""
    encoded = [tuple(encodings.get(name, IDENTITY).shape(p.shape)) for name, p in parameters.items()]
    return {(batch, *shape): "per_example" for shape in encoded} | dict.fromkeys(encoded, "gradients")


class _Idle:
    """A clock that is in no phase."""

    phase = None


def _inference(model: nn.Module, loss) -> Callable[[list[dict[str, torch.Tensor]]], None]:
    """One forward pass without gradients."""
    model.eval()

    def step(batches) -> None:
        with torch.no_grad():
            for batch in batches:
                loss(model, batch)

    return step

"""What a method asks, found by letting it ask: one step of each kind, on a small model, with noise but without an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dpft.harness.engine.base import ForwardEngine, Sums
from dpft.harness.engine.clipping import Clipping
from dpft.harness.plugins.contract import called
from dpft.harness.probes import Clock
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.query.queries import Gradients, Query, Values
from dpft.harness.runs import registry
from dpft.harness.runs.releases import kind_starts, shares
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import hooks, public_rows
from dpft.harness.train.answer import Answers
from dpft.harness.train.core import Core, Found, Watcher
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source, stream
from dpft.methods.base import Method
from dpft.tasks.base import ModelSpec


def questions(spec: RunSpec) -> list[dict[str, Any]]:
    """One entry for every kind of step of a run: `kind`, `steps` [from, to), `asks`: name, share, and what in words.

    spec: of a task whose model is made on the spot. What a later kind asks may follow from earlier answers; here they are noise.
    """
    method, core = _core(spec)
    starts = kind_starts(method)
    found = []
    for step in range(max(starts) + 1):
        heard = _Listener(core)
        declared = shares(method, step)
        method.step(Answers(core, declared, lambda: [], watcher=heard), step)
        if step in starts:
            ends = (*starts[1:], spec.steps)[starts.index(step)]
            asks = [{"name": name, "share": declared[name], "what": text} for name, text in heard.texts.items()]
            found.append({"kind": method.kind(step), "steps": [step, ends], "asks": asks})
    return found


class _Listener(Watcher):
    def __init__(self, core: Core):
        self._core, self.texts = core, {}

    def asked(self, queries: Mapping[str, Query]) -> None:
        for name, query in queries.items():
            self.texts[name] = self._words(query)

    def summed(self, name: str, query: Query, total: Sums, found: Found) -> None:
        if isinstance(query, Gradients):
            asked = {key: t for key, t in total.items() if t.numel() and key in self._core.parameters}
            encoded = any(query.encodings.get(key) is not None for key in asked)  # a turn leaves the shape as it is
            self.texts[name] += f", {len(asked)} of {len(self._core.parameters)} tensors" + ", encoded" * encoded

    def released(self, name: str, noisy: NoisySum) -> None:
        self.texts[name] += f", bound {noisy.clip_norm:g}"

    def _words(self, query: Query) -> str:
        if isinstance(query, Values):
            points = f" at {len(query.at)} points" if query.at else ""
            return f"{query.size} numbers per example{points}"
        if not isinstance(query, Gradients):
            return "nothing: noise alone"
        beside = "" if query.beside is None else f" with {query.beside.size} numbers in the same ball"
        return f"gradients{' of a loss of its own' if query.loss is not None else ''}{beside}"


def _core(spec: RunSpec) -> tuple[Method, Core]:
    method, task = registry.instance(spec), registry.task(spec.task)(spec.task_options)
    method.noise_multiplier = 1.0
    shape = ModelSpec(spec.model, spec.head, spec.max_length, spec.views, spec.batch_norm)
    prepared = task.prepare(public_rows.loaded(method, task, None), shape, stream("cpu", "head", spec.task, spec.seed))
    public_rows.hand_over(method, prepared, task.loss, torch.device("cpu"))
    model = method.prepare(prepared.model, stream("cpu", "method", spec.task, spec.method, spec.seed))
    hooks.check_trainable(method, model, prepared.model.head_parameters)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head, clock = frozenset(model.head_parameters), Clock(torch.device("cpu"))
    method.decoder.setup(model, parameters, head, spec)
    hooks.check_optimizer(method, method.optimizer(parameters, head, spec), parameters, spec.lr)
    private = spec.epsilon is not None
    mechanism = GaussianMechanism(float(private), spec.clip_norm or 1.0, spec.batch_size, source("cpu", "describe"))
    engine = ForwardEngine(model, task.loss, parameters, clock, Clipping(method.rule.function, spec.clip_groups))
    method.rule.start(spec, 1.0, engine.members, model)
    asker = f"Method {called(method)}"
    return method, Core(model, parameters, engine, mechanism, method.rule, spec.clip_norm or float("inf"), clock, asker)

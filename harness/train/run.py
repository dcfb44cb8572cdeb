"""One spec -> one record: build, certify the plan, train, certify what was spent. Exceptions become statuses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dpft.harness import devices, padding
from dpft.harness.border.values import one_line
from dpft.harness.engine import engine_class, wider
from dpft.harness.engine.base import ForwardEngine, PlainEngine, zero_sums
from dpft.harness.engine.clipping import Clipping
from dpft.harness.errors import BadInput, CannotRun, Diverged
from dpft.harness.plugins import blame
from dpft.harness.plugins.contract import called
from dpft.harness.probes import Clock, spectra
from dpft.harness.query import fitting
from dpft.harness.query.preview import first_questions
from dpft.harness.query.queries import Gradients, Values
from dpft.harness.records import chain, provenance
from dpft.harness.records.schema import SCHEMA
from dpft.harness.runs import registry, users
from dpft.harness.runs.plan import PrivacyPlan, plan
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import by_user, hooks, kept_features, lending, loop, public_rows, ranks, recomputing, sections
from dpft.harness.train.core import encodings_of
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.noise import secret_source, source, stream
from dpft.harness.train.parts import OutOfTime, Run, Setup
from dpft.harness.train.sampling import sampler
from dpft.harness.train.settings import MAX_TOKENS, Settings, exact_fp32, keep_freed_memory
from dpft.tasks import halves, model_files
from dpft.tasks.base import ModelSpec


def execute(
    spec: RunSpec,
    settings: Settings,
    observe: loop.Observer,
    checkpoint_path: Path | None = None,
    note: Callable[..., None] = lambda text, trouble=True: None,
    witness: Callable[[], None] = lambda: None,
    compared: set[str] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make one run; returns (record, curve). Only KeyboardInterrupt and the like leave as exceptions.

    note, witness, compared: as in parts.Setup.
    """
    keep_freed_memory()
    exact_fp32()
    together = ranks.here()
    settings = dataclasses.replace(settings, ranks=together.count)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    made, status, error = Run(), "done", None
    setup = privacy_plan = files = None
    begin = time.perf_counter()
    try:
        privacy_plan = together.same(lambda: plan(spec, settings.data_dir, lambda: release_dimension(spec, settings)))
        with contextlib.ExitStack() as stack:
            files = model_files.files_fingerprint(spec.model)
            setup = dataclasses.replace(build(spec, settings, privacy_plan, checkpoint_path), begun=begin)
            stack.enter_context(devices.current(setup.device))
            stack.callback(setup.engine.close)
            stack.callback(setup.mechanism.close)
            stack.callback(kept_features.save)
            loop.train(
                dataclasses.replace(setup, note=functools.cache(note), witness=witness, compared=compared),
                made,
                observe,
            )
            together.everyones(None)  # none has failed at the very end
    except ranks.Failed as reason:
        status, error = reason.status, str(reason)
    except (Exception, SystemExit) as reason:  # a plug-in that calls sys.exit ends its run, not dpft
        status, error = together.failed(*classify(reason))
    together.lend(())
    seconds = made.cost.earlier_seconds + time.perf_counter() - begin
    record = {
        "schema": SCHEMA,
        "run_id": spec.run_id,
        "status": status,
        "spec": spec.to_dict(),
        "privacy": sections.privacy(spec, privacy_plan, made.progress, settings, setup),
        "result": sections.result(spec, made, setup) if status == "done" else None,
        "cost": sections.cost(spec, setup, made.cost, seconds),
        "diagnostics": sections.diagnostics(made),
        "provenance": {**provenance.collect(settings), "started": started, **sections.fingerprints(setup, files)},
        "chain": None,
        "error": error,
    }
    if status == "done":
        record["chain"] = {"version": chain.VERSION, "value": chain.closed(made.progress.chain, record["result"])}
    return record, made.progress.curve


class Skipped(Exception):
    """The method says it cannot run on this model; the message is its reason."""


STATUS_OF = {Skipped: "skipped", Diverged: "diverged", OutOfTime: "timeout", BadInput: "error"}


def classify(error: BaseException) -> tuple[str, str]:
    """(status, one sentence) of an exception that ended a run."""
    text = one_line(" ".join(str(error).split()))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "oom", "Out of memory; lower --max-tokens or the trainable parameters."
    for kind, status in STATUS_OF.items():
        if isinstance(error, kind):
            return status, text
    if sentence := blame.told(error):
        return "error", one_line(sentence)
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f" at {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
    return "error", f"{type(error).__name__}{place}: {text[:500]}"


def release_dimension(spec: RunSpec, settings: Settings) -> int:
    """How many coordinates a run's released sum has; the mechanism holds every release against it.

    Raises CannotRun or Skipped as `build` does.
    """
    return _dimension(spec.setting(with_noise=False), settings)


@functools.lru_cache(maxsize=64)
def _dimension(canonical: str, settings: Settings) -> int:
    spec = RunSpec(**json.loads(canonical))
    if (found := _without_weights(spec, settings)) is not None:
        return found
    method, _, parameters, _ = _model(spec, settings, torch.device("cpu"))
    return _released(method, parameters)


def _without_weights(spec: RunSpec, settings: Settings) -> int | None:
    """The dimension by a model without weights, and with no row encoded; None where the task or the method need the real ones,
    or would fail: then these say why."""
    task, method = registry.task(spec.task)(spec.task_options), registry.instance(spec)
    if public_rows.needed(method):
        return None
    try:
        model = task.bare_model(_wanted(spec))
        classes = () if model is None else task.load(settings.data_dir).classes
        if model is None or (classes and len(classes) != task.classes) or method.skip(model) is not None:
            return None
        model = method.prepare(model, stream("cpu", "method", spec.task, spec.method, spec.seed))
        return _released(method, {name: p for name, p in model.named_parameters() if p.requires_grad})
    except Exception:  # what computes with weights raises anything where there are none
        return None


def _released(method, parameters: dict[str, torch.nn.Parameter]) -> int:
    """How many numbers the first step asks for."""
    found, asked = 0, first_questions(method, 0)
    fitting.check(asked, parameters, f"Method {called(method)}")
    for query in asked.values():
        if isinstance(query, Values):
            found += query.size
        else:
            encodings = encodings_of(query, parameters) if isinstance(query, Gradients) else {}
            found += sum(tensor.numel() for tensor in zero_sums(parameters, encodings).values())
    return found


def _wanted(spec: RunSpec) -> ModelSpec:
    return ModelSpec(spec.model, spec.head, spec.max_length, spec.views, spec.batch_norm)


def _model(spec: RunSpec, settings: Settings, device: torch.device, noise_multiplier: float = 0.0, split: bool = False):
    """(method, task's data with the model to train, trainable parameters by name, names of the head's). split: --shard-model."""
    task, method = registry.task(spec.task)(spec.task_options), registry.instance(spec)
    method.noise_multiplier = noise_multiplier
    data = public_rows.loaded(method, task, settings.data_dir)
    prepared = task.prepare(
        halves.judged(task, data, spec.split),
        _wanted(spec),
        stream("cpu", "head", spec.task, spec.seed),
    )
    hooks.check_prepared(task, prepared)
    if spec.unit == "user":
        prepared = by_user.grouped(prepared, users.of_data(task, data, spec.group_size, prepared), spec.user_sampling)
    reason = method.skip(prepared.model)
    hooks.check_reason(method, reason)
    if reason is not None:
        raise Skipped(reason)
    head = frozenset(prepared.model.head_parameters)
    public_rows.hand_over(method, prepared, _loss(spec, task, device), device)
    model = method.prepare(prepared.model, stream("cpu", "method", spec.task, spec.method, spec.seed))
    hooks.check_trainable(method, model, head)
    if split:
        lending.part(model, spec, device)
    prepared = dataclasses.replace(prepared, model=model.to(device))
    if method.settings.get("features") == "kept":  # an option of methods that train the head alone
        prepared = kept_features.cut(prepared, spec, device, task.encoded_on_disk)
        model = prepared.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise CannotRun(f"{spec.method} leaves nothing trainable in {spec.model}; mend its `prepare`.")
    return method, prepared, parameters, head


def build(spec: RunSpec, settings: Settings, privacy_plan: PrivacyPlan, checkpoint_path: Path | None) -> Setup:
    """Model, data, engine, sampler and mechanism of a run. Raises CannotRun or Skipped with one sentence."""
    device, secure, together = torch.device(settings.device), settings.secure_noise, ranks.here()
    if secure and spec.bands > 1:
        raise CannotRun(
            "Noise that is correlated over steps goes on from earlier noise, which a checkpoint of secure noise must not hold; "
            "leave out --secure-noise, or bands."
        )
    sigma = privacy_plan.noise_multiplier or 0.0
    method, prepared, parameters, head = _model(spec, settings, device, sigma, settings.shard_model)
    task, model = registry.task(spec.task)(spec.task_options), prepared.model
    if len(prepared.train) != privacy_plan.sizes.sampled:
        raise CannotRun(
            f"The task says N = {privacy_plan.sizes.sampled} but {len(prepared.train)} training examples were loaded; "
            "the accounting would be wrong, so mend the data."
        )
    loss = lending.light(_loss(spec, task, device), model, prepared, device, spec)
    if settings.recompute:
        few = padding.sent(prepared.collate(prepared.validation[:2]), device)
        recomputing.enable(model, loss, few, spec.model)
    method.decoder.setup(model, parameters, head, spec)
    clock, key = Clock(device), noise_key(spec)
    engine = _engine(spec, settings, method)(
        model, loss, parameters, clock, Clipping(method.rule.function, spec.clip_groups)
    )
    return Setup(
        spec=spec,
        plan=privacy_plan,
        task=task,
        method=method,
        prepared=prepared,
        parameters=parameters,
        head=head,
        engine=engine,
        clock=clock,
        sampler=sampler(
            privacy_plan.sampling,
            len(prepared.train),
            spec.batch_size,
            spec.task,
            spec.seed,
            secret_source(together) if secure else None,
        ),
        mechanism=Mechanism(
            privacy_plan.noise,
            spec.clip_norm or 0.0,
            spec.batch_size,
            secret_source(together) if secure else source(device, *key, version=spec.noise_stream),
            spec.bands,
        ),
        device=device,
        max_tokens=settings.max_tokens or MAX_TOKENS["cuda" if devices.is_card(device) else "cpu"],
        matrices=spectra.pick(model, parameters),
        deadline=None if settings.timeout is None else time.monotonic() + settings.timeout,
        checkpoint_path=checkpoint_path,
        checkpoint_seconds=settings.checkpoint_seconds,
        secure_noise=secure,
        ranks=together,
    )


def noise_key(spec: RunSpec) -> tuple:
    """What the noise of a run is drawn by. The digest of a user's own files is part of it: an edited row draws all noise anew, so
    that the weights from before and after do not differ by that row alone."""
    content = spec.task_options.get("content")
    return ("noise", spec.task, spec.method, spec.seed, *([content] if content else []))


def _engine(spec: RunSpec, settings: Settings, method):
    if Gradients not in method.asks:
        return ForwardEngine
    return engine_class(settings.engine) if spec.epsilon is not None else PlainEngine


def _loss(spec: RunSpec, task, device: torch.device):
    own = by_user.mean_loss(task.loss) if spec.unit == "user" else task.loss
    if spec.precision == "fp32" and not devices.is_card(device):
        return own

    def loss(model, batch):
        half = spec.precision != "fp32" and not wider.full()
        autocast = torch.autocast(device.type, dtype=torch.bfloat16) if half else contextlib.nullcontext()
        with autocast, padding.known(batch):
            return own(model, batch)

    return loss

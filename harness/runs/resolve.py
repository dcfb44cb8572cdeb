"""From settings to a run: names looked up in the registry, defaults filled in, everything checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpft.harness.border.documents import Misfit, fitted, parsed
from dpft.harness.border.values import Number, Text, Whole, shown
from dpft.harness.errors import BadInput, unknown
from dpft.harness.plugins.contract import SETTINGS
from dpft.harness.query.queries import Values
from dpft.harness.runs import registry
from dpft.harness.runs.releases import kind_starts
from dpft.harness.runs.spec import NOISE_STREAM, RunSpec, check_values, typed

DEFAULTS: dict[str, Any] = {
    "epsilon": 8.0,
    "clip_norm": 1.0,
    "batch_size": 256,
    "steps": 100,
    "optimizer": "adam",
    "eval_every": 10,
}


def resolve(settings: dict[str, Any], data_dir: Path | None = None) -> RunSpec:
    """Complete `settings` to a RunSpec: general defaults < the task's < the method's < what is given.

    Keys that are no field of RunSpec are options of the method, its decoder, its clipping rule or its task. data_dir: where the
    user's own files may lie, whose digest is part of the run. Raises BadInput for unknown names, bad values and bad files.
    """
    settings = {k: v for k, v in settings.items() if v is not None}
    for key in ("task", "method"):
        if key not in settings:
            raise BadInput(f"A run needs a {key}; give --{key} or set it in the suite.")
    task, method = (getattr(registry, key)(typed(key, settings[key])) for key in ("task", "method"))
    of_task = {"model": task.default_model, "head": task.default_head, "max_length": task.default_max_length}
    merged = {**DEFAULTS, **of_task, **method.defaults}
    decoder = registry.decoder(typed("decoder", settings.get("decoder", method.defaults.get("decoder", "mean"))))
    rule = registry.clipping(typed("clipping", settings.get("clipping", method.defaults.get("clipping", "abadi"))))
    defaults = registry.defaults_of(method, decoder, rule)
    options, of_its_own = dict(defaults), dict(task.options)
    for key, value in settings.items():
        if key in SETTINGS:
            merged[key] = typed(key, value)
        elif key in options:
            options[key] = _like(key, value, options[key])
        elif key in of_its_own:
            of_its_own[key] = of_task_option(key, value, of_its_own[key])
        else:
            both = settings["method"] if decoder.name == "mean" else f"{settings['method']} with decoder {decoder.name}"
            all_three = f"{both}, clipping {rule.name}" if rule.options else both
            raise unknown(f"setting of {all_three}", key, SETTINGS | options.keys() | of_its_own.keys())
    if not method.private:
        merged["epsilon"] = merged["clip_norm"] = None
        merged |= {"mechanism": "gaussian", "noise_shape": "spherical", "noise_law": None}  # there is no noise
    else:
        merged["noise_stream"] = NOISE_STREAM
    spec = RunSpec(
        **{k: typed(k, v) for k, v in merged.items()},
        task_version=task.version,
        method_version=method.version,
        decoder_version=decoder.version,
        options={key: value for key, value in options.items() if value != defaults[key]},
        task_options={key: value for key, value in of_its_own.items() if value != task.options[key]},
    )
    check(spec)
    chosen = task(spec.task_options)
    chosen.validate()
    if pinned := chosen.pinned(data_dir):
        spec = replace(spec, task_options={**spec.task_options, **pinned})
    made = registry.make(spec.method, spec.decoder, spec.options, spec.clipping)
    made.validate(spec)
    made.rule.validate(spec, made.asks)
    check_bands(spec)
    for part, setting in ((made, "method"), (made.rule, "clipping")):
        if part.needs_public and not chosen.public:
            raise BadInput(
                f"{part.name} learns from public data, and the task {task.name} has none; take another {setting}, or a task "
                f"with such: {', '.join(sorted(name for name, other in registry.tasks().items() if other.public))}."
            )
    if spec.unit == "user" and not chosen.users:
        own = next((key for key in ("user", "user_rows") if key in task.options), None)
        advice = {"user": "name the column that says it, user=COLUMN", "user_rows": "make users up, user_rows=8"}
        raise BadInput(
            f"The task {task.name} does not say whose its examples are, which unit=user needs; "
            f"{advice.get(own, 'take a task that does, such as classify with user=COLUMN')}, or leave unit out."
        )
    return spec


def check(spec: RunSpec) -> None:
    """That its fields hold what they may, and what its method and its task let them. Raises BadInput, for unknown names too."""
    check_values(spec)
    for key in ("clip_norm", "epsilon"):
        if getattr(spec, key) is None and registry.method(spec.method).private:
            raise BadInput(f"{key} must be a positive number, not None: {spec.method} is private; give one.")
    if (spec.views, spec.batch_norm) != (1, "refuse") and not registry.task(spec.task).images:
        raise BadInput(f"views and batch_norm are settings of image tasks, which {spec.task} is not; leave them out.")


def check_bands(spec: RunSpec) -> None:
    """That noise correlated over steps means something: every step asks one question for gradients, in one space and under one
    bound, so that what the noise of one step takes away from that of another is there. Raises BadInput."""
    if spec.bands == 1 or spec.epsilon is None:
        return
    method = registry.instance(spec)
    reasons = {
        f"there are only {spec.steps} steps": spec.bands > spec.steps,
        f"{spec.method} asks for numbers": Values in method.asks,
        f"{spec.method} asks for gradients in a space that changes from step to step": not method.one_space,
        f"{spec.method} has several kinds of steps": len(kind_starts(method)) > 1,
        f"clipping {spec.clipping} moves the bound from step to step": method.rule.adaptive,
        f"decoder {spec.decoder} takes the noise of steps for independent": spec.decoder != "mean",
    }
    for reason, true in reasons.items():
        if true:
            raise BadInput(f"Noise cannot be correlated over {spec.bands} steps: {reason}; leave out bands.")


def of_task_option(key: str, value: Any, default: Any) -> Any:
    """A task option's value with the type of its default; what is text may look like a number: a column, or a share."""
    if isinstance(default, str) and isinstance(value, int | float):
        value = json.dumps(value)
    return _like(key, value, default)


OPTION = {float: Number, int: Whole, str: Text, bool: bool}


def _like(key: str, value: Any, default: Any) -> Any:
    """An option's value with the type of its default."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = parsed(value)
        except ValueError:
            raise _unlike(key, value, default) from None
    kind = OPTION.get(type(default))
    if kind is None:  # a plug-in's list or table
        if type(value) is not type(default):
            raise _unlike(key, value, default)
        kind = Any
    try:
        return fitted(value, kind)
    except Misfit as problem:
        if type(value) is type(default):
            raise BadInput(f"{key} {problem.why}; correct it.") from None
        raise _unlike(key, value, default) from None


def _unlike(key: str, value: Any, default: Any) -> BadInput:
    return BadInput(f"{key} = {shown(value)} must look like its default {default!r}; correct it.")

"""A run is a value: RunSpec, its canonical JSON, its id; suites that expand to runs."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from dpft.harness.errors import BadInput, unknown
from dpft.harness.privacy.noise_kinds import MECHANISMS, family_law
from dpft.harness.privacy.noise_kinds import SHAPES as NOISE_SHAPES
from dpft.harness.runs import registry
from dpft.tasks.base import BATCH_NORMS, HEADS

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear")
PRECISIONS = ("fp32", "bf16")
CLIP_GROUPS = ("flat", "block", "layer")
NOISE_STREAM = 2  # that of new runs


@dataclass(frozen=True)
class RunSpec:
    """Everything that changes a run's outcome, and nothing else.

    A field that holds its default is left out of the canonical JSON, so a field added later leaves old run ids alone;
    for the same reason the default of an existing field is never changed.

    epsilon, clip_norm: null for methods that are not private; delta null: 1/(2N) of the task's training set.
    batch_size: expected batch size B of Poisson sampling; the sampling probability is B/N.
    eval_examples: validation examples used for the curve (the final value always uses all); null: all.
    clipping: rule by which a gradient is clipped (methods/clipping), and clip_groups: what is clipped together
    (harness/engine/clipping.py).
    decoder: what becomes of the release (methods/decoders).
    mechanism, noise_shape: what noise (harness/privacy/noise_kinds.py); noise_law: of the inverse scale of lmo and plrv, up to
    a factor that is fitted to epsilon; null: searched.
    views: random views of each training image that its loss is averaged over before clipping (2204.13650); batch_norm of image
    models: `refuse`, or `group` to convert it to GroupNorm.
    noise_stream: how noise is drawn (harness/train/noise.py): 1 in records of older versions, whose tail ends early; no setting.
    options: settings of the method (LoRA rank, ...), its decoder and its clipping rule where they differ from their defaults;
    task_options: those of the task.
    """

    task: str
    task_version: int
    model: str
    head: str
    max_length: int
    method: str
    method_version: int
    epsilon: float | None
    clip_norm: float | None
    batch_size: int
    steps: int
    optimizer: str
    lr: float
    eval_every: int
    seed: int = 0
    delta: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    eval_examples: int | None = None
    precision: str = "fp32"
    clipping: str = "abadi"
    clip_groups: str = "flat"
    decoder: str = "mean"
    decoder_version: int = 1
    mechanism: str = "gaussian"
    noise_shape: str = "spherical"
    noise_law: str | None = None
    noise_stream: int = 1
    views: int = 1
    batch_norm: str = "refuse"
    options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, defaults left out."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != _default(f)}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @property
    def run_id(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults included."""
        return asdict(self)

    def lr_factor(self, step: int) -> float:
        """Linear warm-up over `warmup_steps`, then constant, or linear to zero at the last step; step from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        return (self.steps - step) / (self.steps - self.warmup_steps)

    def label(self) -> str:
        """A short name for progress lines."""
        budget = "" if self.epsilon is None else f" eps={self.epsilon:g}"
        decoder = "" if self.decoder == "mean" or self.decoder in self.method else f"+{self.decoder}"
        return f"{self.task}/{self.method}{decoder}{budget} seed={self.seed}"


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """The spec of a record, with the defaults of fields that are younger than the record."""
    younger = {f.name: _default(f) for f in fields(RunSpec) if f.name not in stored and _default(f) is not MISSING}
    return {**stored, **younger}


def _default(f) -> Any:
    if f.default_factory is not MISSING:
        return f.default_factory()
    return f.default


DEFAULTS: dict[str, Any] = {
    "epsilon": 8.0,
    "clip_norm": 1.0,
    "batch_size": 256,
    "steps": 100,
    "optimizer": "adam",
    "eval_every": 10,
}


def resolve(settings: dict[str, Any]) -> RunSpec:
    """Complete `settings` to a RunSpec: general defaults < the task's < the method's < what is given.

    Keys that are no field of RunSpec are options of the method, its decoder or its clipping rule. Raises BadInput for unknown
    names and bad values.
    """
    settings = {k: v for k, v in settings.items() if v is not None}
    for key in ("task", "method"):
        if key not in settings:
            raise BadInput(f"A run needs a {key}; give --{key} or set it in the suite.")
    task, method = registry.task(settings["task"]), registry.method(settings["method"])
    names = {f.name for f in fields(RunSpec)} - {
        "options",
        "task_options",
        "task_version",
        "method_version",
        "decoder_version",
        "noise_stream",
    }
    of_task = {"model": task.default_model, "head": task.default_head, "max_length": task.default_max_length}
    merged = {**DEFAULTS, **of_task, **method.defaults}
    decoder = registry.decoder(_typed("decoder", settings.get("decoder", method.defaults.get("decoder", "mean"))))
    rule = registry.clipping(_typed("clipping", settings.get("clipping", method.defaults.get("clipping", "abadi"))))
    defaults = registry.options(method, decoder, rule)
    options, of_its_own = dict(defaults), dict(task.options)
    for key, value in settings.items():
        if key in names:
            merged[key] = value
        elif key in options:
            options[key] = _like(key, value, options[key])
        elif key in of_its_own:
            of_its_own[key] = _like(key, value, of_its_own[key])
        else:
            both = settings["method"] if decoder.name == "mean" else f"{settings['method']} with decoder {decoder.name}"
            all_three = f"{both}, clipping {rule.name}" if rule.options else both
            raise unknown(f"setting of {all_three}", key, names | options.keys() | of_its_own.keys())
    if not method.private:
        merged["epsilon"] = merged["clip_norm"] = None
        merged |= {"mechanism": "gaussian", "noise_shape": "spherical", "noise_law": None}  # there is no noise
    else:
        merged["noise_stream"] = NOISE_STREAM
    spec = RunSpec(
        **{k: _typed(k, v) for k, v in merged.items()},
        task_version=task.version,
        method_version=method.version,
        decoder_version=decoder.version,
        options={key: value for key, value in options.items() if value != defaults[key]},
        task_options={key: value for key, value in of_its_own.items() if value != task.options[key]},
    )
    _validate(spec)
    task(spec.task_options).validate()
    made = registry.make(spec.method, spec.decoder, spec.options, spec.clipping)
    made.validate(spec)
    made.rule.validate(spec, made)
    return spec


_TYPES = {f.name: str(f.type) for f in fields(RunSpec)}


def _typed(key: str, value: Any) -> Any:
    """`value` as the type its field declares, so that 8 and 8.0 give the same run id."""
    declared = _TYPES[key]
    if value is None and "None" in declared:
        return None
    for kind in (float, int, str):
        if not declared.startswith(kind.__name__):
            continue
        if kind is not str and (isinstance(value, bool) or not isinstance(value, (int, float))):
            break
        if kind is str and not isinstance(value, str):
            break
        if kind is int and value != int(value):
            break
        return kind(value)
    raise BadInput(f"{key} = {value!r} is not {declared.split(' ')[0]}; correct it.")


def _like(key: str, value: Any, default: Any) -> Any:
    """An option's value with the type of its default."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise BadInput(f"{key} = {value!r} must look like its default {default!r}; correct it.") from None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise BadInput(f"{key} = {value!r} must look like its default {default!r}; correct it.")
    return value


def _validate(spec: RunSpec) -> None:
    for key, allowed in (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("precision", PRECISIONS),
        ("clip_groups", CLIP_GROUPS),
        ("head", HEADS),
        ("mechanism", MECHANISMS),
        ("noise_shape", NOISE_SHAPES),
        ("batch_norm", BATCH_NORMS),
    ):
        if getattr(spec, key) not in allowed:
            raise unknown(key, getattr(spec, key), allowed)
    positive = (
        "epsilon",
        "clip_norm",
        "lr",
        "batch_size",
        "steps",
        "eval_every",
        "max_length",
        "eval_examples",
        "views",
    )
    for key in positive:
        value = getattr(spec, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadInput(f"{key} must be a positive number, not {value}; correct it.")
    for key in ("clip_norm", "epsilon"):
        if getattr(spec, key) is None and registry.method(spec.method).private:
            raise BadInput(f"{key} must be a positive number, not None: {spec.method} is private; give one.")
    for key in ("weight_decay", "momentum", "warmup_steps", "seed"):
        if not (math.isfinite(getattr(spec, key)) and getattr(spec, key) >= 0):
            raise BadInput(f"{key} must be zero or more, not {getattr(spec, key)}; correct it.")
    if spec.warmup_steps >= spec.steps:
        raise BadInput(f"warmup_steps ({spec.warmup_steps}) must be fewer than steps ({spec.steps}); lower it.")
    _validate_noise(spec)
    if (spec.views, spec.batch_norm) != (1, "refuse") and not registry.task(spec.task).images:
        raise BadInput(f"views and batch_norm are settings of image tasks, which {spec.task} is not; leave them out.")
    if spec.delta is not None and not 0 < spec.delta < 1:
        raise BadInput(f"delta must lie between 0 and 1, not {spec.delta}; 1/(2N) is the usual choice.")


def _validate_noise(spec: RunSpec) -> None:
    if spec.noise_shape == "coordinates" and spec.mechanism != "laplace":
        raise BadInput(
            f"Noise of mechanism {spec.mechanism} with noise_shape coordinates has no certificate under L2 clipping that "
            "differs from spherical; leave noise_shape out."
        )
    if spec.noise_law is not None:
        if spec.mechanism not in ("lmo", "plrv"):
            raise BadInput(f"Mechanism {spec.mechanism} has no noise_law; use mechanism lmo or plrv, or leave it out.")
        try:
            family_law(spec.mechanism, spec.noise_law)
        except ValueError as problem:
            raise BadInput(f"noise_law cannot be used: {problem}.") from None

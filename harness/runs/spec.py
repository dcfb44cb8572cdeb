"""A run is a value: RunSpec, its canonical JSON, its id, and what its fields may hold. Asks nobody what is registered."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from dpft.harness.border.documents import Misfit, fitted
from dpft.harness.border.values import Filled, Name, Seed
from dpft.harness.errors import BadInput, unknown
from dpft.harness.privacy.noise_kinds import MECHANISMS, family_law
from dpft.harness.privacy.noise_kinds import SHAPES as NOISE_SHAPES
from dpft.harness.privacy.samplings import SAMPLERS
from dpft.harness.privacy.units import UNITS, USER_SAMPLINGS
from dpft.tasks.base import BATCH_NORMS, HEADS, SPLITS

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear")
PRECISIONS = ("fp32", "bf16")
CLIP_GROUPS = ("flat", "block", "layer")
NOISE_STREAM = 2  # that of new runs

# What a field may hold. The far ends are beyond any run that could end, so that a slip of the keyboard is found before training.
Epsilon = Annotated[float, Meta(gt=0, le=1e6)]
Delta = Annotated[float, Meta(ge=0, lt=1)]
ClipNorm = Annotated[float, Meta(gt=0, le=1e9)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]
Decay = Annotated[float, Meta(ge=0, le=1e6)]
Momentum = Annotated[float, Meta(ge=0, lt=1)]
Steps = Annotated[int, Meta(ge=1, le=10**7)]
Warmup = Annotated[int, Meta(ge=0, le=10**7)]
Examples = Annotated[int, Meta(ge=1, le=10**9)]
Length = Annotated[int, Meta(ge=1, le=10**6)]
GroupSize = Annotated[int, Meta(ge=1, le=10**4)]
Views = Annotated[int, Meta(ge=1, le=1000)]
Bands = Annotated[int, Meta(ge=1, le=1000)]
Version = Annotated[int, Meta(ge=0, le=10**6)]


@dataclass(frozen=True)
class RunSpec:
    """Everything that changes a run's outcome, and nothing else.

    A field that holds its default is left out of the canonical JSON, so a field added later leaves old run ids alone;
    for the same reason the default of an existing field is never changed.

    epsilon, clip_norm: null for methods that are not private; delta null: 1/(2N) of the task's training set; 0: pure
    epsilon, where the noise has one (harness/privacy/pure.py).
    batch_size: expected batch size B; an example is in a step's batch with probability B/N, over all steps.
    sampler: how batches are drawn (harness/privacy/samplings.py); truncated_batch_size: where `truncated` cuts them, null:
    far out; bands: public groups of `cyclic`, which take turns, and steps over which its noise is correlated.
    eval_examples: validation examples used for the curve (the final value always uses all); null: all.
    clipping: rule by which a gradient is clipped (methods/clipping), and clip_groups: what is clipped together
    (harness/engine/clipping.py).
    decoder: what becomes of the release (methods/decoders).
    mechanism, noise_shape: what noise (harness/privacy/noise_kinds.py); noise_law: of the inverse scale of lmo and plrv, up to
    a factor that is fitted to epsilon; null: searched.
    views: random views of each training image that its loss is averaged over before clipping (2204.13650); batch_norm of image
    models: `refuse`, `group` to convert it to GroupNorm, or `frozen` to train scale and shift under its running statistics.
    split: what the run is judged on, curve and final value: the whole validation split, or one of its halves (tasks/halves.py).
    unit: whose contribution the budget covers, one example's or a user's (harness/runs/users.py); of the latter `group_size`, how
    many examples of a user count at most, and `user_sampling`, whether batches are drawn of users (`uls`, and batch_size is of
    users) or of examples (`els`).
    noise_stream: how noise is drawn (harness/train/noise.py): 1 in records of older versions, whose tail ends early; no setting.
    options: settings of the method (LoRA rank, ...), its decoder and its clipping rule where they differ from their defaults;
    task_options: those of the task.
    """

    task: Name
    task_version: Version
    model: Filled
    head: Name
    max_length: Length
    method: Name
    method_version: Version
    epsilon: Epsilon | None
    clip_norm: ClipNorm | None
    batch_size: Examples
    steps: Steps
    optimizer: Name
    lr: Rate
    eval_every: Steps
    seed: Seed = 0
    delta: Delta | None = None
    weight_decay: Decay = 0.0
    momentum: Momentum = 0.0
    schedule: Name = "constant"
    warmup_steps: Warmup = 0
    eval_examples: Examples | None = None
    precision: Name = "fp32"
    clipping: Name = "abadi"
    clip_groups: Name = "flat"
    decoder: Name = "mean"
    decoder_version: Version = 1
    mechanism: Name = "gaussian"
    noise_shape: Name = "spherical"
    noise_law: Filled | None = None
    noise_stream: Version = 1
    views: Views = 1
    batch_norm: Name = "refuse"
    split: Name = "whole"
    sampler: Name = "poisson"
    truncated_batch_size: Examples | None = None
    bands: Bands = 1
    unit: Name = "example"
    user_sampling: Name = "uls"
    group_size: GroupSize | None = None
    options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, defaults left out."""
        return self._canonical({})

    def _canonical(self, instead: dict[str, Any]) -> str:
        """As if some fields held something else."""
        values = {**vars(self), **instead}
        kept = {name: value for name, default in _defaults() if (value := values[name]) != default}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def setting(self, with_noise: bool = True) -> str:
        """The canonical JSON that runs share which differ in seed and learning rate alone; with_noise=False: also in epsilon."""
        noise = {} if with_noise else {"epsilon": 1.0, "noise_law": None}
        return self._canonical({"seed": 0, "lr": 1.0, **noise})

    @cached_property
    def run_id(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults included."""
        values = ((name, getattr(self, name)) for name in types())
        return {name: deepcopy(value) if isinstance(value, dict | list) else value for name, value in values}

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
    younger = {name: default for name, default in _defaults() if name not in stored and default is not MISSING}
    return {**stored, **{name: {} if default == {} else default for name, default in younger.items()}}


@cache
def _defaults() -> tuple[tuple[str, Any], ...]:
    """(field, its default, MISSING where it has none)."""
    return tuple((f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(RunSpec))


@cache
def types() -> dict[str, Any]:
    """Field -> the type and range of what it holds."""
    return get_type_hints(RunSpec, include_extras=True)


def typed(key: str, value: Any) -> Any:
    """`value` as the type its field declares, so that 8 and 8.0 give the same run id. Raises BadInput for anything else."""
    kind = types()[key]
    try:
        if isinstance(value, float) and value.is_integer() and _fits(int(value), kind):
            value = int(value)  # 8.0 steps are 8
        return fitted(value, kind)
    except Misfit as problem:
        raise BadInput(f"{key}{problem.where} {problem.why}; correct it.") from None


def _fits(value: Any, kind: Any) -> bool:
    try:
        fitted(value, kind)
    except Misfit:
        return False
    return True


def check_values(spec: RunSpec) -> None:
    """That every field holds what it may hold, whatever the task and the method are. Raises BadInput."""
    for key in types():
        typed(key, getattr(spec, key))
    for key, allowed in (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("precision", PRECISIONS),
        ("clip_groups", CLIP_GROUPS),
        ("head", HEADS),
        ("mechanism", MECHANISMS),
        ("noise_shape", NOISE_SHAPES),
        ("batch_norm", BATCH_NORMS),
        ("split", SPLITS),
        ("sampler", SAMPLERS),
        ("unit", UNITS),
        ("user_sampling", USER_SAMPLINGS),
    ):
        if getattr(spec, key) not in allowed:
            raise unknown(key, getattr(spec, key), allowed)
    if spec.warmup_steps >= spec.steps:
        raise BadInput(f"warmup_steps ({spec.warmup_steps}) must be fewer than steps ({spec.steps}); lower it.")
    _check_noise(spec)
    _check_sampler(spec)
    _check_unit(spec)
    if spec.delta == 0 and (spec.mechanism, spec.noise_shape) != ("laplace", "coordinates"):
        raise BadInput(
            f"Noise of mechanism {spec.mechanism} has no pure epsilon (delta = 0) here; set mechanism=laplace and "
            "noise_shape=coordinates, or leave delta out."
        )


def _check_sampler(spec: RunSpec) -> None:
    for key, sampler, default in (("truncated_batch_size", "truncated", None), ("bands", "cyclic", 1)):
        if getattr(spec, key) != default and spec.sampler != sampler:
            raise BadInput(
                f"{key} belongs to sampler {sampler}, not to {spec.sampler}; set sampler={sampler}, or leave it out."
            )
    if spec.mechanism != "gaussian" and spec.sampler != "poisson":
        raise BadInput(
            f"Sampler {spec.sampler} is certified with Gaussian noise only; leave out mechanism={spec.mechanism}, or the sampler."
        )


def _check_unit(spec: RunSpec) -> None:
    if spec.unit == "example":
        if (spec.user_sampling, spec.group_size) != ("uls", None):
            raise BadInput("user_sampling and group_size are settings of unit=user; set it, or leave them out.")
        return
    if spec.group_size is None:
        raise BadInput(
            "unit=user needs group_size, how many examples of one user count at most (`dpft plan --users` compares); give one."
        )
    if spec.user_sampling == "els" and spec.group_size > 1 and spec.mechanism != "gaussian":
        raise BadInput(
            "With user_sampling=els a batch may hold several examples of a user: accounted for with gaussian noise only, not "
            f"with {spec.mechanism}; take user_sampling=uls."
        )
    if spec.user_sampling == "els" and spec.group_size > 1 and spec.sampler != "poisson":
        raise BadInput(
            f"With user_sampling=els examples are sampled by coins of their own, not by sampler {spec.sampler}; take "
            "user_sampling=uls, or leave the sampler out."
        )
    if spec.user_sampling == "uls" and spec.views != 1:
        raise BadInput(
            "A user's loss is not averaged over random views as well; leave views out, or take user_sampling=els."
        )


def _check_noise(spec: RunSpec) -> None:
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

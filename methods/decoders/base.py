"""The decoder contract: what becomes of a released noisy sum before the optimizer sees it. Post-processing, so free of privacy
cost; a choice of its own beside the method (what trains, how gradients are clipped) and the optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import BadInput, unknown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.noisy_sum import NoisySum
    from dpft.harness.runs.spec import RunSpec


class Decoder:
    """Base class of all decoders.

    Class attributes: `name` (registry key), `version` (raise it when results change: it is part of the run id), `summary`,
    `reference` (arXiv id), `options` (settings with their defaults), `choices` (option -> the values it may have),
    `ranges` (option -> (least, greatest)).
    `preconditions`: the update is a finished direction, so plain SGD with the run's lr applies it. `observing`: the loop
    wants `observed` of this step, numbers by parameter that are functions of the release alone, and, of a decoder that
    preconditions, its `estimate` of the gradient before it does (None: the update is that).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    preconditions: bool = False

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if inspect.isfunction(own := vars(cls).get("decode")):
            cls.decode = _held(own)

    def __init__(self, options: dict[str, Any] | None = None):
        self.settings = {**self.options, **(options or {})}
        self.observing = False
        self.observed: dict[str, dict[str, float | int | bool | None]] = {}
        self.estimate: dict[str, torch.Tensor] | None = None

    @property
    def exact_without_noise(self) -> bool:
        """Whether a release without noise is handed over as its mean, whatever it is."""
        return False

    @property
    def carries(self) -> bool:
        """Whether one step's update depends on the releases of steps before it."""
        return self.preconditions

    @property
    def withholds(self) -> bool:
        """Whether a parameter may get no update at all in a step, because no signal was seen in it."""
        return False

    def validate(self, spec: RunSpec) -> None:
        """Refuse settings that cannot work, before anything trains. Raises BadInput."""
        check_options(self.settings, self.choices, self.ranges)

    def setup(self, model: nn.Module, parameters: dict[str, nn.Parameter], head: frozenset[str], spec: RunSpec) -> None:
        """Look at what trains, once before the run: names, shapes and other public information, never data."""

    def decode(self, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        """The update of each parameter, from the release of step `step` (from 0). May work in place of its tensors."""
        raise NotImplementedError

    def note(self, estimate: dict[str, torch.Tensor]) -> None:
        """Keep a copy of `estimate` where the loop observes, for its alignment; call it before preconditioning in place."""
        from dpft.harness.probes import uncounted

        with uncounted():
            self.estimate = {name: tensor.clone() for name, tensor in estimate.items()} if self.observing else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors the decoder carries from step to step, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""


def _held(decode: Callable[..., Any]) -> Callable[..., Any]:
    """`decode` whose updates are looked at before the method gets them: the error names the decoder, not who used it."""

    @functools.wraps(decode)
    def held(self: Decoder, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        from dpft.harness.query import fitting

        update, who = decode(self, noisy, step), f"`decode` of decoder {self.name} (class {type(self).__name__})"
        if not isinstance(update, Mapping):
            raise BadInput(
                f"{who} returned {fitting.kind_of(update)}; return the update of each parameter by its name."
            )
        for name, made in update.items():
            if problem := fitting.stranger(name, noisy.tensors, "an update is of"):
                raise BadInput(f"{who}: {problem}")
            if problem := fitting.misfit(made, noisy.tensors[name], "what was released of it"):
                raise BadInput(f"{who}: the update of {name} {problem}")
        return update

    return held


def refuse_decoder(decoder: Decoder, why: str) -> None:
    """For a method that takes the mean of its releases alone: raises BadInput for any other decoder, `why` in a clause."""
    if decoder.name != "mean":
        raise BadInput(f"{why}; leave out decoder={decoder.name}.")


def check_options(
    settings: dict[str, Any], choices: dict[str, tuple[str, ...]], ranges: dict[str, tuple[float, float]]
) -> None:
    """Raises BadInput for a setting that is none of its choices or outside its range."""
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise unknown(key, settings[key], allowed)
    for key, (least, greatest) in ranges.items():
        if not least <= settings[key] <= greatest:  # a nan is refused, too
            reach = f"between {least:g} and {greatest:g}" if greatest < float("inf") else f"{least:g} or more"
            raise BadInput(f"{key} must be {reach}, not {settings[key]}; correct it.")


class Mean(Decoder):
    """The noisy sum over the expected batch size: plain DP-SGD."""

    name = "mean"
    summary = "the release as it is, over the expected batch size"
    reference = "arXiv:1607.00133"
    exact_without_noise = True

    def decode(self, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        return noisy.mean()

"""The method contract. A method says what trains, how one example's gradient is encoded before it is clipped, and
how a released noisy sum becomes an update. It never sees a clean gradient, the sampler or the noise."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.methods.decoders.base import Decoder, Mean, check_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.engine.base import Loss
    from dpft.harness.query.encoding import Encoding
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec
    from dpft.harness.train.mechanism import NoisySum


class Method:
    """Base class of all methods: DP-SGD on whatever `prepare` leaves trainable.

    Class attributes: `name` (registry key), `version` (raise it when results change: it is part of the run id),
    `summary`, `reference` (arXiv id), `private` (False: no clipping, no noise, never ranked), `control` (shown beside
    the methods, never ranked), `query` (`gradient`, or `none`: the sum is zero before noise), `defaults` (settings of
    RunSpec; `decoder` may be among them), `options` (the method's own settings with their defaults), `decoder_options`
    (other defaults for its decoder's options; they hold as long as the run keeps that decoder), `choices` and `ranges` (of
    its own options, as decoders have them).
    `preconditions`: its `decode` hands over a finished direction, so plain SGD with the run's lr applies it.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    private: ClassVar[bool] = True
    control: ClassVar[bool] = False
    query: ClassVar[str] = "gradient"
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    options: ClassVar[dict[str, Any]] = {}
    decoder_options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    preconditions: bool = False
    chosen: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self, options: dict[str, Any] | None = None, decoder: Decoder | None = None):
        self.settings = {**self.options, **(options or {})}
        self.decoder = decoder or Mean()

    def validate(self, spec: RunSpec) -> None:
        """Refuse settings that cannot work, before anything is loaded. Raises BadInput."""
        check_options(self.settings, self.choices, self.ranges)
        self.decoder.validate(spec)

    def skip(self, model: nn.Module) -> str | None:
        """A one-sentence reason why this method cannot run on `model`, or None."""
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        """Wrap or freeze `model`: what requires grad afterwards trains. May use public information only.

        The head's parameters (`model.head_parameters`) keep their names.
        """
        return model

    def schedule(self, steps: int) -> None:
        """Told how many steps the run takes, once, before `prepare`: for methods with phases."""

    def phases(self) -> tuple[int, ...]:
        """The steps at which a phase begins: what trains, and so what memory is needed, may change there."""
        return (0,)

    def releases(self, step: int) -> Mapping[str, float]:
        """Name -> share of the step's budget; the shares sum to 1. A function of the step's number alone."""
        return {"gradient": 1.0}

    def selects(self, step: int) -> bool:
        """Whether the release of this step is spent on choosing what trains later; `chosen` (rows by name) says what it was."""
        return False

    def trained(self, parameters: dict[str, nn.Parameter]) -> int:
        """How many numbers train in the end."""
        return sum(p.numel() for p in parameters.values())

    def objective(self, loss: Loss) -> Loss:
        """The loss of each example whose gradient is queried; default: the task's, at the present weights.

        It may be evaluated at other weights that are public or functions of releases, as often as wanted: whatever comes of
        it, one example's gradient is clipped once. Neither it nor the model may keep anything of the examples: the loop
        compares the state of both around every step. What `decode` writes into a buffer of the model is a function of releases.
        """
        return loss

    def rehearsal(self) -> AbstractContextManager[None]:
        """A context in which the objective is as in the middle of a run: engines are checked in it before the first step."""
        return nullcontext()

    def encoding(self, name: str, parameter: nn.Parameter, step: int) -> Encoding | None:
        """Data-independent map (of data: releases are public) of one example's gradient of one parameter; None: identity."""
        return None

    def decode(self, noisy: NoisySum, step: int) -> Updates:
        """Post-processing: the update direction of each parameter, in the parameter's shape. Default: the decoder's.

        A method that overrides this (to map an encoding back) calls `self.decoder` itself, or has no choice of decoders.
        LazyUpdates where one at a time is to be held in that shape. Nothing at all (`{}`): no weight moves in this step.
        """
        return self.decoder.decode(noisy, step)

    def optimizer(
        self, parameters: dict[str, nn.Parameter], head: frozenset[str], spec: RunSpec
    ) -> torch.optim.Optimizer:
        """The optimizer that applies the updates to `parameters`; `head` names those of the task's head.

        Default: the one the run asks for, the head at `head_lr_factor` times the learning rate: a head that starts at zero
        needs steps that would tear a pretrained body apart. A group's `lr_factor` multiplies the schedule. Where method or
        decoder preconditions it is plain SGD, and weight decay is decoupled, as in AdamW.
        """
        import torch

        factor = self.settings.get("head_lr_factor", 1.0)
        body = {"params": [p for name, p in parameters.items() if name not in head], "lr_factor": 1.0}
        top = {"params": [p for name, p in parameters.items() if name in head], "lr_factor": factor}
        groups = [group for group in (body, top) if group["params"]]
        if self.preconditions or self.decoder.preconditions:
            return torch.optim.SGD(groups, lr=spec.lr, weight_decay=spec.weight_decay)
        if spec.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
        return kind(groups, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors the method carries from step to step, for checkpoints. Default: the decoder's."""
        return self.decoder.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.decoder.load_state_dict(state)


def freeze_all_but(model: nn.Module, names: set[str]) -> None:
    """Leave exactly the parameters called `names` trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)

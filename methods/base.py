"""The method contract. A method says what trains; in every step it asks questions of the batch, gets noisy sums, and says
where the weights go. It never sees a clean gradient, the sampler or the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients, Nothing, Values
from dpft.methods.clipping.base import ClippingRule
from dpft.methods.decoders.base import Decoder, Mean, check_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.public import Public
    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec

__all__ = ["Gradients", "Method", "Nothing", "Values", "freeze_all_but"]  # one import for a method's file


class Method:
    """Base class of all methods: DP-SGD on whatever `prepare` leaves trainable.

    Class attributes: `name` (registry key), `version` (raise it when results change; part of the run id), `summary`, `reference`
    (arXiv id), `claim` (one published result, its setting, and where to read it; a subclass has its own or none), `private`
    (False: no clipping, no noise, never ranked), `control` (shown beside the methods, never ranked), `asks` (kinds of its
    questions), `defaults` (settings of RunSpec; `decoder` may be among them), `options` (the method's own settings with their
    defaults), `decoder_options` (other defaults for its decoder's options; they hold as long as the run keeps that decoder),
    `choices` and `ranges` (of its own options, as decoders have them), `space` (setting -> least and greatest value that
    leaderboards search, besides a factor of ten around the default lr). `withholds`: of what requires a gradient, matrices may
    never move, because releases choose which do. `needs_public`: it learns from public examples of the task, which are in
    `public` before `prepare`. `preconditions`: its updates are finished directions, so plain SGD with the run's lr applies them.
    `one_space`: its encodings never change. `numbers`: how many each step releases, where no model decides that. Of the run it
    knows `spec`, `steps` and `noise_multiplier` (sigma of a whole step, 0 without noise), from before `prepare` on; `rule` clips.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    claim: ClassVar[str] = ""
    private: ClassVar[bool] = True
    control: ClassVar[bool] = False
    asks: ClassVar[tuple[type, ...]] = (Gradients,)
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    options: ClassVar[dict[str, Any]] = {}
    decoder_options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    space: ClassVar[dict[str, tuple[float, float]]] = {}
    withholds: ClassVar[bool] = False
    needs_public: ClassVar[bool] = False
    one_space: ClassVar[bool] = True
    preconditions: bool = False
    numbers: int | None = None
    spec: RunSpec
    public: Public
    steps: int = 1
    noise_multiplier: float = 0.0

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.claim = cls.__dict__.get("claim", "")  # what was published of a parent says nothing of its child

    def __init__(self, options: dict[str, Any] | None = None, decoder: Decoder | None = None):
        self.settings = {**self.options, **(options or {})}
        self.decoder = decoder or Mean()
        self.rule = ClippingRule()

    def validate(self, spec: RunSpec) -> None:
        """Refuse settings that cannot work, before anything is loaded. Raises BadInput."""
        check_options(self.settings, self.choices, self.ranges)
        self.decoder.validate(spec)
        if spec.delta == 0 and self.numbers != 1:
            raise BadInput(
                f"Pure epsilon (delta = 0) is certified for one number a step, and {self.name} releases "
                f"{'as many as what trains' if self.numbers is None else self.numbers}; leave delta out."
            )

    def skip(self, model: nn.Module) -> str | None:
        """A one-sentence reason why this method cannot run on `model`, or None."""
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        """Wrap or freeze `model`: what requires grad afterwards trains. May use public information only.

        The head's parameters (`model.head_parameters`) keep their names.
        """
        return model

    def kind(self, step: int) -> str:
        """What kind of step it is, by its number alone; where another begins, memory and engine are looked at anew. Most: one."""
        return ""

    def releases(self, step: int) -> Mapping[str, float]:
        """What is released in a step: name -> share of the step's budget, in sum 1; a function of the step's number alone.

        A release with share w has noise multiplier sigma / sqrt(w), in units of its own bound; together they cost what one
        release of noise multiplier sigma does (1905.02383, Corollary 3.3). One that is never asked for stays paid for.
        """
        return {"gradient": 1.0}

    def step(self, ask: Ask, step: int) -> Updates:
        """Ask, then say where the weights go: the direction of each parameter, in its shape; step counts from 0.

        LazyUpdates where one at a time is to be held in that shape. Nothing at all (`{}`): no weight moves in this step.
        """
        (noisy,) = ask(gradient=Gradients())
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

"""The contract of clipping rules: a choice of the run beside the method, usable with every method that asks for gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.base import check_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.noisy_sum import NoisySum
    from dpft.harness.query.public import Public
    from dpft.harness.query.queries import Seen, Values
    from dpft.harness.runs.spec import RunSpec


class ClippingRule:
    """Base class of all clipping rules: a fixed bound, the run's clip norm.

    Class attributes, as of decoders: `name`, `summary`, `reference`, `options`, `choices`, `ranges`.
    `function`: what the factor of a gradient is as a function of its norm (harness/engine/clipping.py).
    `adaptive`: the bound of a step follows from releases. `needs_public`: it learns from public examples of the task; they are
    in `public`, from before `start` on.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    function: str = "abadi"
    adaptive: ClassVar[bool] = False
    needs_public: ClassVar[bool] = False
    public: Public
    options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}

    def __init__(self, options: dict[str, Any] | None = None):
        self.settings = {**self.options, **(options or {})}

    def validate(self, spec: RunSpec, asks: Sequence[type]) -> None:
        """Refuse settings that cannot work with a method that asks these kinds of questions, before anything trains.

        Raises BadInput.
        """
        check_options(self.settings, self.choices, self.ranges)

    def start(
        self,
        spec: RunSpec,
        noise_multiplier: float,
        groups: Mapping[str, Sequence[str]] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Told once before the run what it is, its noise multiplier sigma, of the whole step, and what trains.

        groups: the parameters of each clipping group, by its name, in the order of all norms [batch, groups]. model: for a
        look at public examples; it may not be changed.
        """

    def shares(self) -> Mapping[str, float]:
        """What is released beside the gradient, by name: shares of the gradient's part of the budget; their sum is under 1."""
        return {}

    def amend(self, gradient: Gradients) -> tuple[Gradients, Mapping[str, Values]]:
        """A method's question for gradients with this step's bound, and the questions asked in the same breath."""
        return gradient, {}

    def learn(self, gradient: NoisySum, beside: Mapping[str, NoisySum]) -> None:
        """Move the bound after the answers; they alone may decide."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that are carried from step to step, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""


def whole(seen: Seen) -> torch.Tensor:
    """[batch] float64: norms of the gradients before clipping, all groups together."""
    return seen.lengths.double().square().sum(1).sqrt()


class Adaptive(ClippingRule):
    """A bound C that starts at the run's clip norm and is multiplied by exp(clip_rate * error) after each step, |error| <= 1.

    Noise follows it (the multiplier never does). C stays between `clip_least` and `clip_most` times where it started: the
    range moves with the start, so that a start that is wrong by 30 leaves room for another 33 on the far side, and no scale of
    gradients is built in. From a start that is wrong by a factor f it takes at least log(f) / (clip_rate * |error|) steps.
    """

    adaptive = True
    options: ClassVar = {"clip_rate": 0.2, "clip_least": 1e-3, "clip_most": 1e3}
    ranges: ClassVar = {"clip_rate": (0.0, 5.0), "clip_least": (1e-9, 1.0), "clip_most": (1.0, 1e9)}

    def validate(self, spec: RunSpec, asks: Sequence[type]) -> None:
        super().validate(spec, asks)
        if spec.clip_norm is None:
            raise BadInput(
                f"{spec.method} clips nothing, so clipping {self.name} has nothing to adapt; leave clipping out."
            )
        if Gradients not in asks:
            raise BadInput(
                f"{spec.method} asks for no gradients, so clipping {self.name} has nothing to "
                "adapt; leave clipping out."
            )
        if spec.mechanism != "gaussian":
            raise BadInput(
                f"Clipping {self.name} releases more than one sum in a step, which is certified for Gaussian noise alone; leave "
                "mechanism out, or take a fixed rule."
            )

    def start(self, spec, noise_multiplier, groups=None, model=None):
        self.clip_norm: float = spec.clip_norm
        self._range = spec.clip_norm * self.settings["clip_least"], spec.clip_norm * self.settings["clip_most"]

    def amend(self, gradient: Gradients) -> tuple[Gradients, Mapping[str, Values]]:
        return replace(gradient, bound=self.clip_norm), {}

    def move(self, error: float) -> None:
        """C <- C exp(clip_rate * error), within its range."""
        self.clip_norm = self.kept(self.clip_norm * math.exp(self.settings["clip_rate"] * error))

    def kept(self, clip_norm: float) -> float:
        """The nearest C within the range."""
        least, most = self._range
        return min(max(clip_norm, least), most)

    def state_dict(self) -> dict[str, torch.Tensor]:
        import torch

        return {"clip_norm": torch.tensor([self.clip_norm], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.clip_norm = float(state["clip_norm"])

"""The contract of clipping rules: a choice of the run beside the method, usable with every method that asks for gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.methods.decoders.base import check_options

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.noisy_sum import NoisySum
    from dpft.harness.query.queries import Gradients, Values
    from dpft.harness.runs.spec import RunSpec


class ClippingRule:
    """Base class of all clipping rules: a fixed bound, the run's clip norm.

    Class attributes, as of decoders: `name`, `summary`, `reference`, `options`, `choices`, `ranges`.
    `function`: what the factor of a gradient is as a function of its norm (harness/engine/clipping.py).
    `adaptive`: the bound of a step follows from releases.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    function: str = "abadi"
    adaptive: ClassVar[bool] = False
    options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}

    def __init__(self, options: dict[str, Any] | None = None):
        self.settings = {**self.options, **(options or {})}

    def validate(self, spec: RunSpec) -> None:
        """Refuse settings that cannot work, before anything trains. Raises BadInput."""
        check_options(self.settings, self.choices, self.ranges)

    def start(self, spec: RunSpec, noise_multiplier: float) -> None:
        """Told once before the run what it is and its noise multiplier sigma, of the whole step."""

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

"""DP-LP-FT: the head is trained first, on frozen features, then everything (Ke et al., 2402.18905).

Prediction: with probe_fraction >= 1/2 at least max(last-layer, dp-adam) - .5 points. Probing costs one forward pass and noise on
the head alone, and a body that starts behind a trained head is not torn apart by the gradients of an untrained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec


class LPFT(DPAdam):
    """Two stages under one noise multiplier, steps of one ledger: the first `probe_fraction` of them ask for the head alone.

    Then all is asked for, in one ball: that of dp-adam. The body's moments begin with the body, so that its first step is Adam's
    first; the head keeps its own, whose noise stays what it was. Head's learning rate: `probe_lr_factor` times the run's
    while probing (as last-layer's), `head_lr_factor` times after it (as dp-adam's). probe_fraction 0 is dp-adam and 1 is
    last-layer: a sweep may have its ends. The paper divides a budget between the stages; here one multiplier does.
    """

    name = "lp-ft"
    summary = "the head alone for a part of the steps, then full fine-tuning"
    reference = "arXiv:2402.18905"
    options: ClassVar = {**DPAdam.options, "probe_fraction": 0.5, "probe_lr_factor": 300.0}
    ranges: ClassVar = {"probe_fraction": (0.0, 1.0), "probe_lr_factor": (0.0, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._optimizer: torch.optim.Optimizer | None = None

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(
            self.decoder,
            f"{self.name} has parameters whose first release comes late, which decoders that count steps do not know",
        )
        if spec.mechanism != "gaussian" and spec.noise_shape == "spherical" and self._border(spec.steps):
            raise BadInput(
                f"{self.name} releases sums of two sizes, and spherical noise is certified for one; leave out "
                f"mechanism={spec.mechanism}."
            )

    def skip(self, model: nn.Module) -> str | None:
        return None if model.head_parameters else f"{self.name} needs a head and this model has none; use dp-adam."

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        self._head = frozenset(model.head_parameters)
        return model

    def _border(self, steps: int) -> int:
        """The first step that trains everything."""
        return round(self.settings["probe_fraction"] * steps)

    def kind(self, step: int) -> str:
        return "probing" if step < self._border(self.steps) else "training"

    def step(self, ask: Ask, step: int) -> Updates:
        probing = self.kind(step) == "probing"
        (noisy,) = ask(gradient=Gradients(only=self._head if probing else None))
        self._rate(probing)
        parts = self.decoder.decode(noisy, step)
        return {name: part for name, part in parts.items() if name in self._head or not probing}

    def _rate(self, probing: bool) -> None:
        """Give the head, the last group, the learning rate of its stage."""
        if self._optimizer is not None:
            factor = self.settings["probe_lr_factor" if probing else "head_lr_factor"]
            self._optimizer.param_groups[-1]["lr_factor"] = factor

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self._optimizer = super().optimizer(parameters, head, spec)
        return self._optimizer

"""Three phases of a run in which releases choose what trains: warm-up, a choice, training. All are steps of one ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import BadInput

if TYPE_CHECKING:
    from dpft.harness.runs.spec import RunSpec


class Phases:
    """For a method: `warmup_fraction` and `selection_fraction` of the steps, at least one each, come before training.

    choosing: the kind of the steps that choose; chosen_parts: what they choose, in words.
    """

    choosing: ClassVar[str] = "selection"
    chosen_parts: ClassVar[str]
    phases: ClassVar[dict[str, tuple[float, float]]] = {
        "warmup_fraction": (0.0, 1.0),
        "selection_fraction": (0.0, 1.0),
    }
    name: ClassVar[str]
    settings: dict[str, Any]
    steps: int

    def check_phases(self, spec: RunSpec) -> None:
        """Raises BadInput where nothing is left for training."""
        train = self.borders(spec.steps)[1]
        if train >= spec.steps:
            raise BadInput(
                f"{self.name} would spend {train} of {spec.steps} steps before it trains {self.chosen_parts}; raise steps, or "
                "lower warmup_fraction or selection_fraction."
            )

    def borders(self, steps: int) -> tuple[int, int]:
        """The first step of the selection, and that of training."""
        select = max(1, round(self.settings["warmup_fraction"] * steps))
        return select, select + max(1, round(self.settings["selection_fraction"] * steps))

    def kind(self, step: int) -> str:
        select, train = self.borders(self.steps)
        return "warm-up" if step < select else self.choosing if step < train else "training"

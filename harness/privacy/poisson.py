"""What a way of drawing batches says of itself to the accounting, and the plainest one; the others: samplings.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

MOST_EXAMPLES = 10**9


@dataclass(frozen=True)
class Poisson:
    """Every example by a coin of its own, in every step.

    A subclass is another sampling: fields are its public parameters, and `kind` its name in specs and ledgers.
    `poisson`: whether a step (or a round of steps, see `participations`) costs what a Poisson-sampled Gaussian at the event's
    sampling probability costs, so that accountants of those serve; else `divergence`, `dp_event` and `least_probability` say it.
    `wider`: how much wider the cells of the second accountant are, where it is slow.
    """

    kind: ClassVar[str] = "poisson"
    poisson: ClassVar[bool] = True
    wider: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or not 1 <= value <= MOST_EXAMPLES:
                raise ValueError(f"{each.name} must be a whole number of at least 1, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """What an event of the ledger says; nothing for Poisson."""
        return {"kind": self.kind, **asdict(self)} if self.kind != "poisson" else {}

    def participations(self, steps: int) -> int:
        """In how many of `steps` steps in a row one example may be drawn, at most: so many are composed."""
        return steps

    def probability(self, share: float) -> float:
        """With what probability an example is drawn where it may be; share: expected batch size over examples."""
        return share

    def told(self) -> str:
        """For a reader."""
        return "Poisson sampling"

    @property
    def together(self) -> int:
        """How many examples of who is protected one batch may hold, each adding as much as the bound."""
        return 1

    def check(self, probability: float, releases: tuple[Any, ...]) -> None:
        """Raises ValueError for an event that is not accounted for under this sampling."""

    def follow(self, other: Poisson) -> None:
        """Raises ValueError where no event of `other`, unlike those before, may follow one of this sampling."""
        if other != self:
            raise ValueError(f"batches are drawn as {other.kind} after others that were not drawn so")

    def divergence(self, probability: float, sigma: float, remove: bool) -> Callable[[Any], Any]:
        """eps [n] -> hockey-stick divergence [n] of one step, at most, with the example against without it (`remove`), or the
        other way round. Only where not `poisson`, as the rest."""
        raise NotImplementedError

    def dp_event(self, probability: float, sigma: float) -> Any:
        """The same step for dp-accounting."""
        raise NotImplementedError

    def least_probability(self, probability: float) -> float:
        """How often an example is in a batch: the step costs no less than a Poisson-sampled Gaussian of that probability."""
        raise NotImplementedError

    def presences(self, probability: float) -> list[tuple[int, float]]:
        """(how many examples of who is protected a batch holds, probability) wherever it holds any, at most."""
        return [(1, probability)]


POISSON = Poisson()

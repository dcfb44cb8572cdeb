"""What a step may ask of the examples of its batch. One question is answered by one noisy sum (noisy_sum.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:  # methods are listed without torch
    import torch
    from torch import nn

    from dpft.harness.query.encoding import Encoding
    from dpft.harness.query.noisy_sum import NoisySum

    Batch: TypeAlias = dict[str, torch.Tensor]
    Loss: TypeAlias = Callable[[nn.Module, Batch], torch.Tensor]  # one number per example, [batch]

Bound: TypeAlias = "float | Mapping[str, float]"
Point: TypeAlias = Callable[[], AbstractContextManager]


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Each example's gradient, encoded, clipped and summed. Answered by parameter, in the encoded shapes.

    Attributes:
        encodings: by parameter, a linear map of one example's gradient before it is clipped; a function of public things and of
            releases. None of a parameter: the identity.
        only: names of the parameters asked for; None: all that train. The others contribute nothing and get no noise.
        bound: the clip norm C; or one for each clipping group, and C is the root of the sum of their squares; None: the run's.
            A function of public things and of releases, never of data.
        loss: from the task's loss to that whose gradient is asked for; None: the task's, at the present weights. It may be
            evaluated elsewhere, at weights that are public or functions of releases, as often as wanted: one example's
            gradient is clipped once. It may keep nothing of the examples.
        beside: numbers that share the gradient's ball.
    """

    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    only: frozenset[str] | None = None
    bound: Bound | None = None
    loss: Callable[[Loss], Loss] | None = None
    beside: Beside | None = None


@dataclass(frozen=True, kw_only=True)
class Beside:
    """`of(seen)` [batch, size]: numbers of every example in one ball with its clipped gradient, released with the same noise.

    The harness cuts them to the room that the clipped gradient leaves, sqrt(C^2 - ||gradient||^2): together never above C.
    """

    size: int
    of: Callable[[Seen], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Values:
    """A row of numbers per example, clipped to `bound` in L2 and summed. No backward pass. Answered by `NoisySum.values`.

    Attributes:
        size: numbers in a row.
        of: from what may be seen of some examples to their rows, [batch, size], dense or sparse (COO). An example's row is a
            function of that example alone, of public things and of releases, and may be anything where it is absent: the
            harness asks only of those in the batch. It may keep nothing of the examples.
        bound: the largest length of a row that is summed; a function of public things and of releases.
        at: public points at which the whole batch is looked at, one after the other, in evaluation mode: each makes a context
            in which the model computes with other weights. None: the losses of `Seen` are those of the present weights.
    """

    size: int
    of: Callable[[Seen], torch.Tensor]
    bound: float
    at: Sequence[Point] = ()


@dataclass(frozen=True)
class Nothing:
    """No example contributes anything: noise alone, in the shapes of what trains. For controls."""


Query: TypeAlias = Gradients | Values | Nothing


@dataclass(frozen=True)
class Seen:
    """What `of` may look at, of the examples of one microbatch; it never leaves the harness.

    Attributes:
        model, batch: as the task's loss gets them; batch: tensors [b, ...].
        lengths: [b, groups] norms before clipping of the gradients asked for in the same breath; None where there are none.
        clipped: [b] norms of the whole gradients after clipping; None where there are none.
        evaluate: how `losses` are computed, when first asked for.
    """

    model: nn.Module
    batch: Batch
    evaluate: Callable[[], torch.Tensor]
    lengths: torch.Tensor | None = None
    clipped: torch.Tensor | None = None

    @cached_property
    def losses(self) -> torch.Tensor:
        """[b], or [b, points] of a question at points."""
        return self.evaluate()


class Ask(Protocol):
    """Asks all questions of one breath of the step's batch: `noisy, count = ask(gradient=Gradients(), count=Values(...))`.

    Every name must be declared by `Method.releases` for the step, and may be asked once. A second call looks at the same batch
    again and may use the answers to the first. All releases of a step are booked before the first one is drawn.
    """

    def __call__(self, **queries: Query) -> tuple[NoisySum, ...]: ...


def named(queries: Mapping[str, Query], kind: type) -> dict[str, Query]:
    """Those of `queries` that are of one kind."""
    return {name: query for name, query in queries.items() if isinstance(query, kind)}

"""When values are looked at. A look at a card waits for all that is queued on it, so a step has one, when its update is queued.

What is looked at late is what may end a run (losses, norms and updates that are not finite, buffers that have changed) and what a
curve's row says. Until then nothing of the step is written, evaluated or kept: a step that is found wrong ends the run, and the
weights that it has moved go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dpft.harness.engine.fakes import has_values

Told = Callable[[torch.Tensor], None]


class Later:
    """Looks at once: on a CPU nobody waits."""

    def ask(self, values: torch.Tensor, told: Told) -> None:
        """Call `told` with the values on the CPU, in their shape and type; it may raise."""
        if has_values(values):
            told(values.cpu())

    def settle(self) -> None:
        """Tell what has been asked for so far, in that order; the first that raises ends it."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error in here may follow from a value that was to be looked at later; then what is raised is about that value."""
        try:
            yield
        except Exception:
            self.settle()
            raise


class OneLook(Later):
    """Looks at everything together when it is settled."""

    def __init__(self) -> None:
        self._asked: list[tuple[torch.Tensor, Told]] = []

    def ask(self, values: torch.Tensor, told: Told) -> None:
        if not has_values(values):
            return
        if values.device.type == "cpu":
            told(values)
        else:
            self._asked.append((values.detach(), told))

    def settle(self) -> None:
        asked, self._asked = self._asked, []
        if not asked:
            return
        bits = torch.cat([_bits(values) for values, _ in asked]).cpu()
        for (values, told), own in zip(asked, bits.split([values.numel() for values, _ in asked]), strict=True):
            found = own.view(torch.float64) if values.is_floating_point() else own
            told(found.to(values.dtype).view(values.shape))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """int64 [n], from which the values come back exactly."""
    flat = values.reshape(-1)
    return flat.double().view(torch.int64) if values.is_floating_point() else flat.to(torch.int64)


AT_ONCE = Later()

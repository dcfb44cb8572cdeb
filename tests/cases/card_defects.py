"""Defects that a run on a card can have, planted one at a time: what looks for them must find each."""

from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from unittest.mock import patch

import torch

from dpft.harness import devices
from dpft.harness.probes import clock
from dpft.harness.query import updates
from dpft.harness.train import hooks, loop
from dpft.methods.decoders import row_moments


@contextmanager
def a_number():
    """The update's size is looked at before it is applied."""
    check = hooks.check_update

    def looked(method, update, parameters):
        check(method, update, parameters)
        float(next(iter(update.values())).sum())

    with patch.object(hooks, "check_update", looked):
        yield


@contextmanager
def a_branch():
    """The loop asks whether a release is zero, to write nothing of it."""
    apply = loop._apply

    def asked(setup, optimizer, update, *rest):
        return apply(setup, optimizer, {name: t for name, t in update.items() if (t != 0).any()}, *rest)

    with patch.object(loop, "_apply", asked):
        yield


def pageable():
    """Batches go to the card tensor by tensor, from memory that is not pinned."""
    return patch.object(
        devices,
        "sent_together",
        lambda batch, device: {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()},
    )


@contextmanager
def left_behind():
    """What a checkpoint holds of the moments of rows stays on the host."""
    at = row_moments.KeptRows.at

    def stayed(self, rows, size, like):
        if self._names is not None and self._places is None:
            self._places = torch.full((size,), -1, dtype=torch.int32, device=rows.device)
            self._enter(self._names.to(rows.device), 0)
        return at(self, rows, size, like)

    with patch.object(row_moments.KeptRows, "at", stayed):
        yield


@contextmanager
def another_card():
    """Time is taken, and the card waited for, on the one that happens to be current."""

    class Module:
        def __init__(self, module):
            self.Event, self.current_stream, self.synchronize = (
                module.Event,
                lambda device: module.current_stream(),
                lambda device: module.synchronize(),
            )

    of = devices.of
    with ExitStack() as stack:
        stack.enter_context(patch.object(devices, "current", lambda device: nullcontext()))
        stack.enter_context(
            patch.object(clock.devices, "of", lambda device: Module(of(device)) if _timing() else of(device))
        )
        yield


def _timing():
    import sys

    return sys._getframe(2).f_code.co_filename == clock.__file__


def tensor_by_tensor():
    """The evaluated step looks at every parameter by itself."""
    alignment = import_module("dpft.harness.probes.alignment")  # the package has a function of that name
    return patch.object(alignment, "_looked", lambda values: [float(value) for value in values])


@contextmanager
def _after(steps, spoil):
    """`spoil(parameter)` after so many updates."""
    apply, made = updates.apply, [0]

    def spoilt(optimizer, parameters, update):
        apply(optimizer, parameters, update)
        made[0] += 1
        if made[0] == steps:
            with torch.no_grad():
                spoil(next(iter(parameters.values())))

    with patch.object(updates, "apply", spoilt):
        yield


def not_finite():
    """A weight is nan from the third step on, and so is the loss."""
    return _after(2, lambda p: p.fill_(float("nan")))


@contextmanager
def infinite_update():
    """The third step's update is infinite, its losses are fine."""
    check, made = hooks.check_update, [0]

    def spoilt(method, update, parameters):
        check(method, update, parameters)
        made[0] += 1
        if made[0] == 3:
            next(iter(update.values())).fill_(float("inf"))

    with patch.object(hooks, "check_update", spoilt):
        yield


@contextmanager
def remembered():
    """The model's buffer takes up something of the third batch."""
    from dpft.harness.train import answer

    numbers, made = answer.Answers._gradients, [0]

    def kept(self, *what):
        made[0] += 1
        if made[0] == 3:
            next(b for b in self._core.model.buffers() if b.is_floating_point() or b.numel() > 1).add_(1)
        return numbers(self, *what)

    with patch.object(answer.Answers, "_gradients", kept):
        yield


PLANTED = {
    planted.__name__: planted
    for planted in (
        a_number, a_branch, pageable, left_behind, another_card, tensor_by_tensor, not_finite, infinite_update, remembered,
    )
}  # fmt: skip

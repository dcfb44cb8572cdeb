"""BatchNorm mixes the examples of a batch, so no gradient is one example's: refuse it, freeze it, or put GroupNorm there."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun

if TYPE_CHECKING:
    from torch import nn

GROUPS, LEAST_CHANNELS = 32, 4  # at most so many groups (1803.08494), of at least so many channels each


def refuse_batch_norm(model: nn.Module, source: str) -> None:
    """Raise CannotRun naming the first BatchNorm module: it makes an example's gradient depend on the others."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            kind = type(module).__name__
            raise CannotRun(
                f"{source} has a {kind} at {name}, which mixes examples; take a model without BatchNorm, or, for images, convert "
                "it with batch_norm=group, or keep its statistics with batch_norm=frozen."
            )


def settle(model: nn.Module, how: str | None, source: str) -> None:
    """Do with BatchNorm, in place, what `how` (the run's batch_norm, None for texts) or the configuration says.

    Raises CannotRun for one that would mix the examples of a batch.
    """
    if how == "group" or getattr(model.config, "dpft_norm", None) == "group":
        convert(model)
    if how == "frozen":
        freeze(model, source)
    else:
        refuse_batch_norm(model, source)


def freeze(model: nn.Module, source: str) -> None:
    """Every BatchNorm normalises by its running statistics and never changes them, in training too; its scale and shift train.

    So it maps each example alone, and what it knows of a distribution is what it came with. Raises CannotRun where it has none.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is None:
                raise CannotRun(
                    f"{source} has a BatchNorm without statistics at {name}; convert it with batch_norm=group."
                )
            module.__class__ = _frozen(type(module))
            module.eval()


@cache
def _frozen(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of BatchNorm that stays in evaluation mode whatever mode its model is put into."""

    def train(self, mode: bool = True) -> nn.Module:
        return super(frozen, self).train(False)

    frozen = type(f"Frozen{kind.__name__}", (kind,), {"train": train, "__doc__": _frozen.__doc__})
    return frozen


def convert(model: nn.Module) -> None:
    """Replace every BatchNorm2d by a GroupNorm with its scale and shift, in place.

    The running statistics are dropped: the layer normalises each image by its own. What was pretrained with BatchNorm is not the
    same function afterwards.
    """
    from torch import nn

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, _group_norm(child))


def _group_norm(old: nn.BatchNorm2d) -> nn.GroupNorm:
    from torch import nn

    channels = old.num_features
    groups = math.gcd(GROUPS, max(1, channels // LEAST_CHANNELS))  # a power of two
    while channels % groups:
        groups //= 2
    new = nn.GroupNorm(groups, channels, eps=old.eps, affine=old.affine)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    return new

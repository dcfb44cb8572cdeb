"""The bound follows the room that clipped gradients leave below it (SlaClip, ICML 2026)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Beside
from dpft.methods.clipping.base import Adaptive, whole

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.queries import Seen

MOST_SLOTS = 1000


class SlaClip(Adaptive):
    """C <- C exp(eta (gamma - s_1)), gamma = 1 - beta (1 - s_K): s_1 is about the share of gradients within C, s_K of tiny ones.

    eta: `clip_rate`; beta: `slack_weight`. Each example fills K slots of C/sqrt(K), one after the other, with sqrt(K) times the
    room max(0, C - norm); they share the gradient's ball and noise (see `slots`), so that the signal costs no budget. s is
    their released mean in units of a full slot: s_k lies between the shares of norms up to (1 - k/K) C and (1 - (k-1)/K) C, and
    its noise is sigma sqrt(K)/B. By default (`slots` 0) K = (B/(5.15 sigma))^(2/3), where the middle 99% of that noise are
    as wide as the 1/K between two slots; at least 2.
    gamma aims at the share 1 - beta where no gradient is tiny, and at more the more are: examples that are learnt do not
    pull C after them. `tiny`: `share` takes s_K as it is, a number without a unit, so that C follows a change of the
    gradients' scale. The authors' code takes s_K/C (`over-bound`), which makes gamma depend on the unit of the loss: it
    saturates at 1 for small C and forgets s_K for large. It also divides by the realised batch, which is no function of the
    release; here B is the expected one.
    From a start F times too large C falls by exp(-eta beta min(1, K/F)) a step: with few slots most gradients look tiny.
    Their code's defaults: eta .5, beta .55, K 20, C in [.1, 50].
    """

    name = "slaclip"
    summary = "C follows the room that clipped gradients leave below it, released in their ball at no cost"
    reference = "ICML 2026, github.com/SlaClip/SlaClip"
    options: ClassVar = {**Adaptive.options, "slack_weight": 0.5, "slots": 0, "tiny": "share"}
    choices: ClassVar = {"tiny": ("share", "over-bound")}
    ranges: ClassVar = {**Adaptive.ranges, "slack_weight": (0.0, 1.0), "slots": (0, MOST_SLOTS)}

    def validate(self, spec, asks):
        super().validate(spec, asks)
        if self.settings["slots"] == 1:
            raise BadInput("slots must be 2 or more, or 0 for a number that suits batch and noise; correct it.")

    def start(self, spec, noise_multiplier, groups=None, model=None):
        super().start(spec, noise_multiplier, groups, model)
        self.slots: int = self.settings["slots"] or slots_for(spec.batch_size, noise_multiplier)

    def amend(self, gradient):
        if gradient.beside is not None:
            raise BadInput(
                "The method fills the room beside its gradients itself, so clipping slaclip cannot; choose another."
            )
        beside = Beside(size=self.slots, of=partial(slots, clip_norm=self.clip_norm, count=self.slots))
        return replace(super().amend(gradient)[0], beside=beside), {}

    def learn(self, gradient, beside):
        full = gradient.clip_norm / math.sqrt(self.slots)
        released = gradient.beside.tolist()
        first, last = released[0] / full, released[-1] / full
        if self.settings["tiny"] == "over-bound":
            last /= gradient.clip_norm
        target = 1 - self.settings["slack_weight"] * (1 - last)
        self.move(min(max(target, 0.0), 1.0) - min(max(first, 0.0), 1.0))


def slots(seen: Seen, clip_norm: float, count: int) -> torch.Tensor:
    """[batch, count]: sqrt(count) * room of each example, in slots of clip_norm/sqrt(count), the first ones first.

    The room is a = max(0, C - norm) of the whole gradient before clipping; c <= min(norm, C) is its length after it (cut group
    by group it may be far below both). With lambda for a full slot |slots|^2 <= lambda sum(slots) = C a, and
    c^2 + C a <= c^2 + C (C - c) <= C^2: slots and clipped gradient fit in one ball of C, as the harness enforces anyway.
    """
    import torch

    full = clip_norm / math.sqrt(count)
    room = (clip_norm - whole(seen)).clamp_min(0.0)
    taken = full * torch.arange(count, dtype=torch.float64, device=room.device)
    return (math.sqrt(count) * room[:, None] - taken).clamp(0.0, full)


def slots_for(expected_batch_size: int, noise_multiplier: float) -> int:
    """K at which the middle 99% of a slot's noise, 5.15 sigma sqrt(K)/B, are as wide as 1/K."""
    if noise_multiplier <= 0:
        return MOST_SLOTS
    return min(max(round((expected_batch_size / (5.15 * noise_multiplier)) ** (2 / 3)), 2), MOST_SLOTS)

"""Time by phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch

from dpft.harness import devices

PHASES = ("forward", "backward", "clip", "noise", "decode", "optimizer")


class Clock:
    """Seconds by phase of one step at a time; a phase inside another stops the outer one's time.

    On a card the borders are events in its stream: the device is waited for once, when the seconds are taken.
    processor: seconds of all of this process's threads in the phases that were taken last, which does not grow where other
    processes want the same cores; None on a card.
    """

    def __init__(self, device: torch.device):
        self._card = device if devices.is_card(device) else None
        self.phase: str | None = None
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []
        self.processor: float | None = None

    @contextmanager
    def __call__(self, phase: str | None):
        """None: in no phase."""
        outer = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    @contextmanager
    def stopped(self):
        """The phases of what is done in here are not counted; not inside a phase."""
        spans, self._spans = self._spans, []
        try:
            yield
        finally:
            self._spans = spans

    def _enter(self, phase: str | None) -> None:
        if self._card is not None:
            card = devices.of(self._card)
            now = card.Event(enable_timing=True)
            now.record(card.current_stream(self._card))
        else:
            now = (time.perf_counter(), time.process_time())
        if self.phase is not None:
            self._spans.append((self.phase, self._since, now))
        self.phase, self._since = phase, now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        if self._card is not None:
            devices.of(self._card).synchronize(self._card)
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, end in self._spans:
            seconds[phase] += end[0] - start[0] if self._card is None else start.elapsed_time(end) / 1e3
        self.processor = sum(end[1] - start[1] for _, start, end in self._spans) if self._card is None else None
        self._spans = []
        return dict(seconds)

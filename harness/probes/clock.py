"""Time by phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("forward", "backward", "clip", "noise", "decode", "optimizer")


class Clock:
    """Seconds by phase of one step at a time; a phase inside another stops the outer one's time.

    On CUDA the borders are events in the stream: the device is waited for once, when the seconds are taken.
    processor: seconds of all of this process's threads in the phases that were taken last, which does not grow where other
    processes want the same cores; None on CUDA.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
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
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = (time.perf_counter(), time.process_time())
        if self.phase is not None:
            self._spans.append((self.phase, self._since, now))
        self.phase, self._since = phase, now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, end in self._spans:
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end[0] - start[0]
        self.processor = None if self._cuda else sum(end[1] - start[1] for _, start, end in self._spans)
        self._spans = []
        return dict(seconds)

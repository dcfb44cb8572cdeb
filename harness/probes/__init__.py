"""Measurements beside the training: alignment, time by phase, live memory. Non-private, never fed back into it."""

from dpft.harness.probes.alignment import (
    SELECTION,
    Look,
    add_row_scores,
    alignment,
    cosine,
    gradient,
    norm,
    overlap,
    signal_to_noise,
)
from dpft.harness.probes.clock import PHASES, Clock
from dpft.harness.probes.live import LiveBytes, counted_as, uncounted

__all__ = [
    "PHASES",
    "SELECTION",
    "Clock",
    "LiveBytes",
    "Look",
    "add_row_scores",
    "alignment",
    "cosine",
    "counted_as",
    "gradient",
    "norm",
    "overlap",
    "signal_to_noise",
    "uncounted",
]

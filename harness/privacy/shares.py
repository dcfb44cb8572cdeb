"""Shares of a step's budget: each release's own noise multiplier."""

from __future__ import annotations

import math


def noise_multiplier(sigma: float, share: float) -> float:
    """sigma / sqrt(share), in units of the release's own bound; a hair above it, so that what merges is never below sigma."""
    return sigma if share == 1 else sigma / math.sqrt(share) * (1 + 1e-12)

"""All checks with p-values of what a run showed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from dpft.harness.audit import batch_checks, noise_checks
from dpft.harness.audit.alarms import Check
from dpft.harness.audit.observe import Observation


def run_checks(seen: Observation, redrawn: Mapping[Any, numpy.ndarray]) -> list[Check]:
    """Those of noise, then those of batches and contributions. redrawn: as `replayed.Redrawn` has it."""
    return [*noise_checks.checks(seen, redrawn), *batch_checks.checks(seen)]

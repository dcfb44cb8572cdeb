"""All checks with p-values of what a run showed."""

from __future__ import annotations

from dpft.harness.audit import batch_checks, noise_checks
from dpft.harness.audit.alarms import Check
from dpft.harness.audit.observe import Observation


def run_checks(seen: Observation) -> list[Check]:
    """Those of noise, then those of batches and contributions."""
    return [*noise_checks.checks(seen), *batch_checks.checks(seen)]

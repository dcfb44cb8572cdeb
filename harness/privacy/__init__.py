"""Privacy accounting: the ledger of what was released, its epsilon, the certificate of a run and its verification.

Example-level, zero-out neighbours with public N, Poisson sampling or what samplings.py has, Gaussian noise or noise of random
scale. Nothing here imports torch, and the accounting libraries are imported when first used.
"""

from dpft.harness.privacy.accountant import calibrate, tolerance
from dpft.harness.privacy.certificate import certify, matched
from dpft.harness.privacy.curve import epsilon_curve
from dpft.harness.privacy.ledger import Ledger, Release, merged_noise_multiplier
from dpft.harness.privacy.recompute import verify_record
from dpft.harness.privacy.spent import epsilon

__all__ = [
    "Ledger",
    "Release",
    "calibrate",
    "certify",
    "epsilon",
    "epsilon_curve",
    "matched",
    "merged_noise_multiplier",
    "tolerance",
    "verify_record",
]

"""What the tests of accounting share."""

from dpft.harness.privacy import Ledger, Release

DELTA = 1e-5


def gaussian(*sigmas):
    return [Release(name=f"r{number}", noise_multiplier=sigma) for number, sigma in enumerate(sigmas)]


def ledger_of(*phases):
    """A ledger from (steps, q, releases) phases, booked step by step as the loop does."""
    ledger = Ledger()
    for steps, q, releases in phases:
        for _ in range(steps):
            ledger.append(ledger.steps, q, releases)
    return ledger


def events_of(q, sigma, steps):
    return ledger_of((steps, q, gaussian(sigma))).events

"""The banded strategy of noise that is correlated over steps (2306.08153): C, its inverse, and what they make of noise.

C is lower triangular, Toeplitz and `bands` wide: the first coefficients of the square root of the matrix of prefix sums
(2405.15913), scaled so that a column has length 1. The noise of step t is w_t of w = C^-1 z, z independent. C (x + sigma w) is
C x + sigma z, so what is released is a Gaussian mechanism of C x, which one step moves by the length of a column at most. The
last columns are cut by the end of the run, and shorter.
"""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=64)
def coefficients(bands: int) -> tuple[float, ...]:
    """c_0, ..., c_(b-1), whose squares sum to 1; of one band 1."""
    found = [1.0]
    for k in range(1, bands):
        found.append(found[-1] * (2 * k - 1) / (2 * k))  # of (1 - x)^(-1/2)
    length = math.sqrt(math.fsum(c * c for c in found))
    return tuple(c / length for c in found)


@functools.lru_cache(maxsize=64)
def inverse(bands: int, steps: int) -> tuple[float, ...]:
    """d_0, ..., d_(T-1), the first column of C^-1: w_t = sum_j d_j z_(t-j)."""
    c, found = coefficients(bands), []
    for step in range(steps):
        fed = math.fsum(c[k] * found[step - k] for k in range(1, min(bands, step + 1)))
        found.append(((1.0 if step == 0 else 0.0) - fed) / c[0])
    return tuple(found)


def deviation(bands: int, step: int) -> float:
    """Standard deviation of w_t of a step (from 0): 1 without bands, and more with each."""
    if bands == 1:
        return 1.0
    enough = inverse(bands, 1 << step.bit_length())  # a power of two, so that few are computed
    return math.sqrt(math.fsum(d * d for d in enough[: step + 1]))


def prefix_deviation(bands: int, steps: int) -> float:
    """Root of the mean square, over T steps, of the noise of the prefix sums w_0 + ... + w_t: what the sum of all updates so far
    holds of noise, where an optimizer adds them."""
    total, prefix, squares = 0.0, 0.0, []
    for d in inverse(bands, steps):
        prefix += d
        total += prefix * prefix
        squares.append(total)
    return math.sqrt(math.fsum(squares) / steps)

"""Verdicts that hold whenever one stops adding seeds: the t test as an e-process, its confidence sequence, four verdicts.

For differences that are normal with unknown variance, the Bayes factor under the right Haar prior on the scale and a normal
prior of variance G on the effect size is an e-process for each mean: with n pairs, nu = n - 1 and t their t statistic,

    E = (1 + n G)^(-1/2) [(1 + t^2/nu) / (1 + t^2/(nu (1 + n G)))]^((nu + 1)/2)

exceeds 1/level at any n with probability at most `level` (2310.03722; 1906.07801). Means with E below that are a
confidence sequence. Means of accuracies over hundreds of examples are near enough to normal; the tests simulate binomial ones.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05
G = 1.0  # the prior's variance of the effect size: of differences about as large as their spread
MOST = 10_000  # pairs; beyond, nothing is foretold


@dataclass(frozen=True)
class Sequential:
    """What paired differences say so far.

    Attributes:
        verdict: `better`, `worse`, `the same`, or `undecided`.
        difference: their mean.
        low: lower end of the confidence sequence, minus infinity with too few pairs; high: its upper end.
        seeds: how many pairs.
        more: pairs beyond these after which it would be decided if mean and spread stay as they are; 0 where it is decided,
            None where none of MOST would do.
    """

    verdict: str
    difference: float
    low: float
    high: float
    seeds: int
    more: int | None


def half_width(n: int, std: float, level: float = LEVEL) -> float:
    """Half the width of the confidence sequence after `n` pairs whose standard deviation (ddof 1) is `std`."""
    if n < 2:
        return math.inf
    grown = 1.0 + n * G
    bound = (math.sqrt(grown) / level) ** (2.0 / n)
    if bound >= grown:
        return math.inf
    u = (bound - 1.0) / (1.0 - bound / grown)  # t^2 / nu at the border
    return math.sqrt(u * (n - 1)) * std / math.sqrt(n)


def verdict(differences: Sequence[float], margin: float, level: float = LEVEL) -> Sequential:
    """The verdict on paired differences, method minus baseline, larger is better.

    margin: a difference that is none. `better` and `worse`: zero is outside of the sequence; `the same`: all of it lies within
    `margin` of zero. Of a difference that is certain and yet within the margin `the same` is said: it is too small to matter.
    """
    n = len(differences)
    mean = statistics.fmean(differences) if n else 0.0
    std = statistics.stdev(differences) if n > 1 else 0.0
    half = half_width(n, std, level) if n > 1 else math.inf
    found = _said(mean, half, margin)
    return Sequential(found, mean, mean - half, mean + half, n, _more(n, mean, std, margin, level, found))


def _said(mean: float, half: float, margin: float) -> str:
    if mean - half >= -margin and mean + half <= margin:
        return "the same"
    if mean - half > 0:
        return "better"
    if mean + half < 0:
        return "worse"
    return "undecided"


def _more(n: int, mean: float, std: float, margin: float, level: float, found: str) -> int | None:
    if found != "undecided":
        return 0
    if n < 2:
        return None
    at = bisect.bisect_left(
        range(n + 1, MOST), True, key=lambda k: _said(mean, half_width(k, std, level), margin) != found
    )
    return None if n + 1 + at >= MOST else 1 + at  # the sequence only narrows

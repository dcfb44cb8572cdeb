"""From numbers to what may be concluded: paired tests, intervals, censored times, robustness, fronts.

Pure functions of numbers: no records, no files, no torch. Seeds are the unit of repetition, and methods that share a seed share
their batches, so comparisons are paired. Where there are too few seeds the functions say so instead of returning a figure.
"""

from dpft.harness.statistics.aggregate import FEWEST, Interval, interval, iqm, profile
from dpft.harness.statistics.censored import Reached, median_reached, restricted_mean, to_threshold, win_probability
from dpft.harness.statistics.paired import (
    EXACT_UP_TO,
    LEVEL,
    SIMULATED,
    Comparison,
    SignFlip,
    compare,
    detectable_difference,
    fewest_seeds,
    holm,
    sign_flip,
    smallest_p,
)
from dpft.harness.statistics.pareto import front
from dpft.harness.statistics.robustness import Width, lr_width, uneven_grids

__all__ = [
    "EXACT_UP_TO",
    "FEWEST",
    "LEVEL",
    "Comparison",
    "Interval",
    "Reached",
    "SIMULATED",
    "SignFlip",
    "Width",
    "compare",
    "detectable_difference",
    "fewest_seeds",
    "front",
    "holm",
    "interval",
    "iqm",
    "lr_width",
    "median_reached",
    "profile",
    "restricted_mean",
    "sign_flip",
    "smallest_p",
    "to_threshold",
    "uneven_grids",
    "win_probability",
]

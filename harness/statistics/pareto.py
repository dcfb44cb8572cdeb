"""Which rows no other row beats in both score and cost."""

from __future__ import annotations

from collections.abc import Sequence

from dpft.harness.statistics.aggregate import finite


def front(
    costs: Sequence[float], scores: Sequence[float], higher_is_better: bool = True, tolerance: float = 0.0
) -> list[bool]:
    """Whether each point is on the Pareto front: no other has at most its cost and at least its score, one of them strictly.

    Costs and scores in the same order, costs not negative. Points with equal scores and costs are on the front together.
    tolerance: relative difference of two costs that counts as none (measured costs are never exactly equal).
    """
    c, s = finite(costs, "costs"), finite(scores, "scores") * (1 if higher_is_better else -1)
    better = (s[None, :] > s[:, None]) & (c[None, :] <= c[:, None] * (1 + tolerance))
    cheaper = (s[None, :] == s[:, None]) & (c[None, :] * (1 + tolerance) < c[:, None])
    return (~(better | cheaper).any(axis=1)).tolist()

"""Which rows no other row beats in both score and cost."""

from __future__ import annotations

from collections.abc import Sequence

from dpft.harness.statistics.aggregate import finite


def front(costs: Sequence[float], scores: Sequence[float], higher_is_better: bool = True) -> list[bool]:
    """Whether each point is on the Pareto front: no other has at most its cost and at least its score, one of them strictly.

    Equal points are on the front together. Costs and scores in the same order.
    """
    c, s = finite(costs, "costs"), finite(scores, "scores") * (1 if higher_is_better else -1)
    cheaper, better = c[None, :] <= c[:, None], s[None, :] >= s[:, None]
    strictly = (c[None, :] < c[:, None]) | (s[None, :] > s[:, None])
    return (~(cheaper & better & strictly).any(axis=1)).tolist()

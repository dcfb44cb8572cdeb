"""What one run asks of a Ray cluster, and how many such runs its nodes hold at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpft.harness.errors import CannotRun

Node = dict[str, float]  # resource -> how much the node has, as ray.nodes() says


@dataclass(frozen=True)
class Share:
    """Of one run. cards: a part of one where several runs share it."""

    cpus: float
    cards: float = 0.0

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    def options(self) -> dict[str, float]:
        """As ray.remote takes them."""
        return {"num_cpus": self.cpus, **({"num_gpus": self.cards} if self.cards else {})}

    def slots(self, nodes: Sequence[Node]) -> int:
        """How many runs fit: none is on two nodes."""
        return sum(self._on(node) for node in nodes)

    def _on(self, node: Node) -> int:
        fit = [node.get("CPU", 0.0) / self.cpus] if self.cpus else []
        if self.cards:
            each = round(1 / self.cards)
            fit.append(node.get("GPU", 0.0) * each)
        return math.floor(min(fit) + 1e-6)


def share(nodes: Sequence[Node], device: str, jobs: int | None) -> Share:
    """What each of `jobs` runs gets, None: of as many as there are cards, or CPUs.

    Cards count unless `device` is the CPU. Where there are fewer than runs, each is shared by the same number of runs, so that
    all of them fit; CPUs are the most with which all `jobs` fit, and one where they do not.
    Raises CannotRun where cards are asked for and no node has one, or no node has a CPU.
    """
    cards = 0.0 if device == "cpu" else sum(node.get("GPU", 0.0) for node in nodes)
    if device.startswith("cuda") and not cards:
        raise CannotRun(
            f"--device {device} asks for a card and no node of the Ray cluster has one; add such a node or leave it out."
        )
    if cards:
        runs = jobs or int(cards)
        part = 1 / math.ceil(runs / cards) if runs > cards else 1.0
        holding = [node for node in nodes if node.get("GPU", 0.0) > 0]
        # a node may have more cards than CPUs: then runs share those, too
        least = min(node.get("CPU", 0.0) / (node["GPU"] / part) for node in holding)
        return _most(holding, runs, part, least)
    if max((node.get("CPU", 0.0) for node in nodes), default=0.0) < 1:
        raise CannotRun("No node of the Ray cluster has a CPU to run on; start one with `ray start --num-cpus N`.")
    return _most(nodes, jobs, 0.0, 1.0) if jobs else Share(1)


def _most(nodes: Sequence[Node], runs: int, cards: float, otherwise: float) -> Share:
    """The most CPUs with which `runs` runs fit."""
    for cpus in range(int(max(node.get("CPU", 0.0) for node in nodes)), 0, -1):
        if Share(cpus, cards).slots(nodes) >= runs:
            return Share(cpus, cards)
    return Share(otherwise if otherwise < 1 else int(otherwise), cards)

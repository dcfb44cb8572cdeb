"""What records say of a contest: which settings tuning chose, what the tests found, and which runs are wanted next.

Nothing is stored: all of it follows from the records, whoever made them and in whatever order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.leaderboard.board import Arm, Board, Contest, Rules
from dpft.harness.runs.spec import RunSpec
from dpft.harness.statistics.sequential import LEVEL, Sequential, verdict

TINY = 1e-12  # a margin for a question that has none: is it worse at all
Record = dict[str, Any]
Look = Callable[[RunSpec], Record | None]  # the record of a run, None where it has not been made


@dataclass
class Tuning:
    """Of one arm.

    Attributes:
        chosen: the settings that won, None as long as tuning goes on, and where every trial failed.
        scores: (settings, metric of each seed on the tune half), as they were tried; NaN: the run failed.
        todo: runs that are wanted before it can go on.
        failed: why no trial ended well, None where one did.
    """

    chosen: dict[str, Any] | None = None
    scores: list[tuple[dict[str, Any], list[float]]] = field(default_factory=list)
    todo: list[RunSpec] = field(default_factory=list)
    failed: str | None = None


def tuning(arm: Arm, rules: Rules, look: Look) -> Tuning:
    """Successive halving over seeds (1502.07943): all trials with one seed, the better half with another, and so on.

    Rounds are whole runs, not shorter ones: noise is calibrated for all steps, and early rank says little under it.
    """
    points = arm.points()
    found = Tuning(scores=[(point, []) for point in points])
    if len(points) == 1:
        found.chosen = points[0]
        return found
    alive = list(range(len(points)))
    reason = None
    for seed, going_on in enumerate(rules.rounds(len(points))):
        alive = alive[:going_on]
        for i in alive:
            spec = arm.tried(points[i], seed)
            record = look(spec)
            if record is None:
                found.todo.append(spec)
            else:
                found.scores[i][1].append(final(record))
                reason = record.get("error") or reason
        if found.todo:
            return found
        alive.sort(key=lambda i: (-_mean(found.scores[i][1]), i))
        if _mean(found.scores[alive[0]][1]) == -math.inf:
            found.failed = reason
            return found
    found.chosen = points[alive[0]]
    return found


@dataclass
class Standing:
    """One arm of a contest as far as it has come.

    Attributes:
        arm: which.
        tuning: how its settings were chosen.
        records: of its tests, by seed; those that failed are among them.
        verdict: against the baseline over the seeds that both have; None for controls, the baseline and before tests.
    """

    arm: Arm
    tuning: Tuning
    records: dict[int, Record] = field(default_factory=dict)
    verdict: Sequential | None = None

    @property
    def finals(self) -> dict[int, float]:
        """Seed -> metric on the test half, larger is better; without seeds that failed."""
        return {seed: final(r) for seed, r in self.records.items() if r["status"] == "done"}

    @property
    def spec(self) -> RunSpec:
        """The settings of its tests, seed 0; once they are chosen."""
        return self.arm.tested(self.tuning.chosen, 0)

    @property
    def mean(self) -> float:
        return _mean(list(self.finals.values()))


def standings(contest: Contest, rules: Rules, look: Look) -> list[Standing]:
    """Every arm, with its verdict at the level that holds for all of the contest's verdicts together (Bonferroni)."""
    found = [_standing(arm, rules, look) for arm in contest.arms]
    base = baseline(found, rules)
    rivals = [one for one in found if one is not base and not one.arm.control]
    for one in rivals:
        if base is not None and (pairs := paired(one, base)):
            one.verdict = verdict(pairs, rules.margin, LEVEL / len(rivals))
    return found


def paired(one: Standing, other: Standing) -> list[float]:
    """Differences over the seeds that both have, in the order of seeds."""
    mine, theirs = one.finals, other.finals
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def baseline(found: list[Standing], rules: Rules) -> Standing | None:
    return next((one for one in found if one.arm.name == rules.baseline), None)


def plain(found: list[Standing]) -> Standing | None:
    """The tested run without privacy."""
    return next((one for one in found if one.arm.settings["method"] == "non-private" and one.finals), None)


def judged(found: list[Standing]) -> list[Standing]:
    """Those that compete and have been tested."""
    return [one for one in found if not one.arm.control and one.finals]


def leading(found: list[Standing], rules: Rules) -> tuple[Standing, list[Standing], list[Standing]]:
    """(the judged arm with the best mean, those not shown to be worse, those that are), of at least one judged arm.

    Shown it is by the seeds that both have, or by their verdicts against the baseline: a leader whose interval there ends above
    another's is better than it.
    """
    first, *others = sorted(judged(found), key=lambda one: -one.mean)
    # the leader was chosen by the same data, so every pair counts
    level = LEVEL / max(1, (len(others) + 1) * len(others) // 2)
    base = baseline(found, rules)
    least, _ = _against(first, base)
    behind = [
        one
        for one in others
        if _against(one, base)[1] < least or verdict(paired(one, first), TINY, level).verdict == "worse"
    ]
    return first, [one for one in others if one not in behind], behind


def _against(one: Standing, base: Standing | None) -> tuple[float, float]:
    """The ends of what is known of its difference to the baseline."""
    if one is base:
        return 0.0, 0.0
    return (one.verdict.low, one.verdict.high) if one.verdict is not None else (-math.inf, math.inf)


def wanted(board: Board, look: Look) -> list[RunSpec]:
    """The runs that are wanted next, of every contest at once; none: all verdicts are in, or at their most seeds."""
    todo = [spec for contest in board.contests for spec in _wanted(contest, board.rules, look)]
    return list({spec.run_id: spec for spec in todo}.values())


def _wanted(contest: Contest, rules: Rules, look: Look) -> Iterator[RunSpec]:
    found = standings(contest, rules, look)
    for one in found:
        yield from one.tuning.todo
    seeds = {id(one): rules.seeds[0] for one in found}
    base = baseline(found, rules)
    for one in found:
        if base is None or one.verdict is None or one.verdict.verdict != "undecided":
            continue
        have = min(_tried(one), _tried(base))
        if have >= rules.seeds[0]:
            most = min(have + rules.block, rules.seeds[1])
            seeds[id(one)] = most
            seeds[id(base)] = max(seeds[id(base)], most)
    for one in found:
        if one.tuning.chosen is not None:
            for seed in range(seeds[id(one)]):
                spec = one.arm.tested(one.tuning.chosen, seed)
                if seed not in one.records and look(spec) is None:
                    yield spec


def _standing(arm: Arm, rules: Rules, look: Look) -> Standing:
    found = Standing(arm, tuning(arm, rules, look))
    if found.tuning.chosen is not None:
        for seed in range(rules.seeds[1]):
            record = look(arm.tested(found.tuning.chosen, seed))
            if record is not None:
                found.records[seed] = record
    return found


def failures(contest: Contest, rules: Rules, look: Look) -> int:
    """Runs that ended without a result, of tuning and tests."""
    found = standings(contest, rules, look)
    tried = [value for one in found for _, scores in one.tuning.scores for value in scores]
    return sum(map(math.isnan, tried)) + sum(r["status"] != "done" for one in found for r in one.records.values())


def tested(board: Board, look: Look, most: int) -> list[str]:
    """Run ids of the tests of the settings that tuning chose, of every contest: those with the first `most` seeds.

    Raises BadInput for a board that has none yet.
    """
    found = [
        one.records[seed]["run_id"]
        for contest in board.contests
        for one in standings(contest, board.rules, look)
        for seed in sorted(one.records)[:most]
    ]
    if not found:
        raise BadInput(f"There are no tests of leaderboard {board.name} here; make them with `dpft run {board.name}`.")
    return found


def _tried(one: Standing) -> int:
    """Seeds 0, 1, ... without a gap that have been run, failed or not."""
    return next(seed for seed in range(len(one.records) + 1) if seed not in one.records)


def final(record: Record) -> float:
    """The metric, larger is better; NaN where the run failed."""
    result = record["result"]
    if record["status"] != "done" or result is None:
        return math.nan
    return result["final"] if result["higher_is_better"] else -result["final"]


def _mean(values: list[float]) -> float:
    """Minus infinity where there is none, or a run failed: settings that fail now and then are not chosen."""
    return statistics.fmean(values) if values and not any(map(math.isnan, values)) else -math.inf

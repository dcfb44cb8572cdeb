"""What may be concluded from one group: paired differences to a baseline, learning rates, Pareto fronts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from dpft.harness import statistics as st
from dpft.harness.report import rows as making
from dpft.harness.report.reading import Curves
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import target_of
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import FREE_SETTINGS, Group, hardware

SAME_MEMORY, SAME_TIME = 0.01, 0.05  # relative differences that are none
MARGIN = 0.05  # of the way from chance to a method's best: within it a learning rate is as good


@dataclass(frozen=True)
class Verdicts:
    """The competing rows of a group against its baseline, over the seeds that both have, by the names of the rows.

    chosen_of: rows that could have been the baseline, which is the best of them. Where there are several, the same seeds chose it
    and judge the others: all pairs with any of them count.
    """

    base: str
    baseline: Row
    rivals: dict[str, Row]
    found: dict[str, st.Comparison]
    chosen_of: int = 1


def verdicts(group: Group, baseline: str | None) -> Verdicts | None:
    """Every competing method against the baseline, each at its best learning rate.

    None where the rows are not ranked, there is no baseline, or no method shares two seeds with it. Rows with failed seeds, and
    those whose records do not verify, are paired with nothing.
    """
    if group.reason is not None:
        return None
    free = FREE_SETTINGS if group.view.steps_free else ("lr",)
    chosen = [making.ordered(rows)[0] for rows in making.complete(group.rows, free)]
    could = candidates(chosen, baseline)
    base = best(could)
    if base is None:
        return None
    named = {name: row for name, row in zip(group.names, group.rows, strict=True) if any(row is r for r in chosen)}
    first = next(name for name, row in named.items() if row is base)
    whole = base.whole
    rivals = {name: row.whole for name, row in named.items() if row is not base}
    rivals = {name: row for name, row in rivals.items() if len(row.finals.keys() & whole.finals.keys()) > 1}
    if not rivals:
        return None
    many = len(could)
    tests = None if many == 1 else math.comb(many, 2) + many * max(0, len(rivals) + 1 - many)
    finals = {name: row.finals for name, row in rivals.items()}
    found = st.compare(finals, whole.finals, higher_is_better=base.higher_is_better, tests=tests)
    return Verdicts(first, whole, rivals, found, many)


@dataclass(frozen=True)
class Leading:
    """The method with the best mean of a group, and what can be told of the others beside it; names are those of the rows.

    Attributes:
        first: the leader.
        level: those not shown to be worse, best first.
        behind: those that are.
        cannot: why these seeds could show nothing whatever the data, None where they could.
    """

    first: str
    level: list[str]
    behind: list[str]
    cannot: str | None


def leading(group: Group) -> Leading | None:
    """Every method that has a rank against the first; None without ranks.

    The leader was chosen by the same data, so every pair of methods counts (Bonferroni over the sign-flip tests).
    """
    placed = zip(group.names, group.rows, group.ranks, strict=True)
    named = {name: row.whole.finals for name, row, rank in placed if rank is not None}
    if not named:
        return None
    first, *others = named
    sign = 1 if group.rows[0].higher_is_better else -1
    pairs = max(1, len(named) * len(others) // 2)
    tests = {name: st.sign_flip(found) for name in others if (found := _apart(named[name], named[first]))}
    behind = [
        name
        for name, test in tests.items()
        if test.p * pairs <= st.LEVEL and sign * sum(_apart(named[name], named[first])) < 0
    ]
    smallest = min((test.smallest * pairs for test in tests.values()), default=1.0)
    cannot = None
    if others and smallest > st.LEVEL:
        shared = max(len(named[name].keys() & named[first].keys()) for name in others)
        seeds = f"{shared} seed{'s' if shared != 1 else ''}"
        cannot = f"{seeds} cannot show a difference between {len(named)} methods whatever the data"
        enough = st.fewest_seeds(st.LEVEL / pairs)
        cannot += f"; {enough} could" if enough <= st.EXACT_UP_TO else ""
    return Leading(first, [name for name in others if name not in behind], behind, cannot)


def _apart(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences over the seeds that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def differences(group: Group, curves: Curves, baseline: str | None) -> list[Part]:
    """The table of the group's verdicts; nothing where it has none."""
    made = verdicts(group, baseline)
    if made is None:
        return []
    target = target_of(group.rows, curves)
    cells = []
    for name, row in made.rivals.items():
        shared = made.found[name].seeds
        earlier = _earlier(*(curves.reached(making.on(one, shared), target) for one in (row, made.baseline)))
        cells.append(_line(name, made, earlier))
    return [_heading(made, group), Table(cells)]


def _earlier(steps: list[st.Reached | None], of_base: list[st.Reached | None]) -> str:
    if not steps or None in steps or None in of_base:
        return "–"
    return f"{st.win_probability([one.step for one in steps], [one.step for one in of_base]):.2f}"


def candidates(rows: list[Row], name: str | None) -> list[Row]:
    """The rows that others may be compared with: of the method `name`, else of dp-adam, else of dp-sgd."""
    if name is not None:
        return [row for row in rows if row.method == name]
    by_method = defaultdict(list)
    for row in rows:
        if row.baseline:
            by_method[row.method].append(row)
    return by_method["dp-adam"] or by_method["dp-sgd"]


def best(rows: list[Row]) -> Row | None:
    """The best of `rows` by the most seeds, ranked on or not."""
    whole = {id(row.whole.records[0]): row for row in rows}
    return whole[id(making.ordered(making.finished([row.whole for row in rows]))[0].records[0])] if rows else None


def _line(name: str, made: Verdicts, earlier: str) -> dict[str, str]:
    one = made.found[name]
    if one.interval is not None:
        interval = f"{one.interval.low:+.4f} to {one.interval.high:+.4f}"
    else:
        interval = f"({min(one.values):+.4f} to {max(one.values):+.4f})"
    return {
        "method": name,
        "seeds": str(len(one.seeds)),
        "difference": f"{one.difference:+.4f}",
        "95% interval": interval,
        "p": ("" if one.exact else "~") + f"{one.p:.3g}",
        "Holm's p" if made.chosen_of == 1 else "adjusted p": f"{one.adjusted:.3g}",
        "detectable": _detectable(one),
        "P(earlier)": earlier,
        "verdict": one.verdict,
    }


def _detectable(one: st.Comparison) -> str:
    if math.isfinite(one.detectable):
        return f"{one.detectable:.4f}"
    needed = st.fewest_seeds(one.holm_level)
    then = st.detectable_difference(one.std, needed, one.holm_level)
    return f"none; {then:.4f} with {needed} seeds" if math.isfinite(then) else "none"


def _heading(made: Verdicts, group: Group) -> str:
    chosen = "settings" if group.view.steps_free else "learning rate"
    methods = len(made.found)
    over = f"Holm over {methods} method{'s' if methods > 1 else ''}"
    if made.chosen_of > 1:
        over = f"it is the best of {made.chosen_of} by these seeds, so all pairs with any of them count (Bonferroni)"
    return (
        f"Paired differences in {group.result['metric']} to `{made.base}` over shared seeds, each method at the {chosen} with "
        f"its best mean over these seeds; {over}."
    )


READING = (
    f"How to read the paired differences. p: two-sided sign-flip test over seeds, exact up to {st.EXACT_UP_TO} of them; it does "
    f"not cover the choice of learning rates. Interval: bootstrap; in parentheses, below {st.FEWEST} seeds, only their "
    "range. Detectable: the true difference that this test shows with power 80% at level 5% divided by the number of methods "
    f"(Holm's first step), simulated with {st.SIMULATED:,} sets of normal differences of the spread seen; none where that "
    "many seeds cannot reach the level whatever the data. P(earlier): that a run reaches the threshold in fewer steps than one "
    "of the baseline, ties half, runs that do not reach it infinitely late; – where the evaluations cannot tell."
)


def learning_rates(group: Group) -> list[Part]:
    """How wide the range of good learning rates is, for methods that ran at two or more with the same number of seeds."""
    grids = making.complete(group.every)
    if not any(len(rows) > 1 for rows in grids):
        return []
    names = making.names([Row({**rows[0].spec, "lr": None}, rows[0].records) for rows in grids])
    whole = {id(row): rows for rows in making.alike(group.every) for row in rows}
    cells, tries = [], {}
    for name, rows in zip(names, grids, strict=True):
        chance, tried = rows[0].records[0]["result"]["chance"], whole[id(rows[0])]
        tries[name] = {row.spec["lr"] for row in tried} | set(rows[0].lost)
        scores = {row.spec["lr"]: row.final for row in rows}
        best = (max if rows[0].higher_is_better else min)(scores.values())
        width = st.lr_width(scores, MARGIN * abs(best - chance), rows[0].higher_is_better)
        cells.append(
            {
                "method": name,
                "learning rates": ", ".join(f"{lr:g}" for lr in sorted(scores)) + _failed(tried),
                "best": f"{width.best:g}",
                "as good": f"{width.low:g} to {width.high:g}" if len(scores) > 1 else "–",
                "octaves": (("≥ " if width.open else "") + f"{width.octaves:.2g}") if len(scores) > 1 else "–",
            }
        )
    text = (
        f"Robustness to the learning rate. As good: neighbours of the best within {MARGIN:.0%} of the way from chance to it; "
        "≥: the grid ends there."
    )
    uneven = st.uneven_grids(tries)
    return [text if uneven is None else f"{text} {uneven}", Table(cells)]


def _failed(rows: list[Row]) -> str:
    """The rates of one configuration at which seeds failed."""
    rates = sorted({row.spec["lr"] for row in rows if row.failed} | set(rows[0].lost))
    return f"; failed: {', '.join(f'{lr:g}' for lr in rates)}" if rates else ""


def fronts(group: Group) -> tuple[dict[str, list[str]], int]:
    """({cost: names on the front of the metric against it}, rows whose step time can be compared with no other's).

    The costs are `memory` and, for each kind of hardware, `step time on ...`; nothing where the group has no ranks.
    """
    named = [(name, row) for name, row in zip(group.names, group.rows, strict=True) if row.ranked]
    if len(named) < 2 or group.reason is not None:
        return {}, 0
    found = {"memory": _front(named, [row.peak_bytes for _, row in named], SAME_MEMORY)}
    by_machine = defaultdict(list)
    for name, row in named:
        if row.step_s is not None:
            by_machine[frozenset(hardware(record) for record in row.records)].append((name, row))
    comparable = {machine: rows for machine, rows in by_machine.items() if len(machine) == 1 and len(rows) > 1}
    for machine, rows in sorted(comparable.items(), key=lambda item: sorted(item[0])):
        found[f"step time on {next(iter(machine))}"] = _front(rows, [row.step_s for _, row in rows], SAME_TIME)
    return found, len(named) - sum(map(len, comparable.values()))


def pareto(group: Group) -> list[Part]:
    """Which rows are on the front of metric against memory and, within one kind of hardware, against the time of a step."""
    found, left = fronts(group)
    if not found:
        return []
    lines = [f"{cost}: {', '.join(names)}" for cost, names in found.items()]
    text = (
        f"Pareto front of mean {group.result['metric']} against "
        f"{'; against '.join(lines)}. "
        f"Memory within {SAME_MEMORY:.0%} and times within {SAME_TIME:.0%} count as equal."
    )
    if left:
        text += f" {left} row{'s' if left > 1 else ''} more: times unknown, from other hardware or from several kinds."
    return [text]


def _front(named: list[tuple[str, Row]], costs: list[float], tolerance: float) -> list[str]:
    keep = st.front(costs, [row.final for _, row in named], named[0][1].higher_is_better, tolerance)
    return [name for (name, _), on in zip(named, keep, strict=True) if on]

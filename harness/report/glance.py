"""The one picture of a setting: the metric against memory or, with several budgets, against epsilon."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpft.harness import statistics as st
from dpft.harness.report.figures import look
from dpft.harness.report.pairs import SAME_MEMORY
from dpft.harness.report.rows import Row

FRONT, OTHER, CONTROL = "#0072B2", "0.6", "#D55E00"
NEAR = 0.06  # of the panel's height: names closer than this share no line
WIDE = 0.1  # memories closer than this, as a share of the largest, are not worth an axis
MANY = 12  # rows, from which on only those of the front are named
FAR = 0.6  # of the range of the dots: a control further away would squeeze them
Named = dict[str, Row]


def usual_baseline(rows: Iterable[Row]) -> Row | None:
    """What costs are ratios of: dp-adam with a usual clipping rule, else dp-sgd."""
    known = [row for row in rows if row.baseline]
    return min(known, key=lambda r: (r.method != "dp-adam", r.spec.get("clipping") != "abadi"), default=None)


def picture(several: Sequence[tuple[float, Named]], metric: str):
    """(title, a function that draws on axes) of the rows at each epsilon, smallest first; None where there is nothing to see."""
    if len(several) > 2:
        return f"{metric} by ε", _lines(several, metric)
    named = several[-1][1]
    ranked = {name: row for name, row in named.items() if row.ranked}
    sizes = [row.peak_bytes for row in ranked.values()]
    if len(ranked) < 2 or max(sizes) - min(sizes) < WIDE * max(sizes):
        return None
    return f"{metric} against memory", _scatter(named, ranked, metric)


def _lines(several: Sequence[tuple[float, Named]], metric: str):
    def paint(axes) -> None:
        axis = axes[0][0]
        names = list(dict.fromkeys(name for _, named in reversed(several) for name in named))
        for i, name in enumerate(names):
            points = [(epsilon, named[name].final) for epsilon, named in several if name in named]
            axis.plot(*zip(*points, strict=True), label=name, **look(i))
        axis.set(xscale="log", xlabel="ε", ylabel=metric)
        ticks = [epsilon for epsilon, _ in several]
        axis.set_xticks(ticks, [f"{epsilon:g}" for epsilon in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2)

    return paint


@dataclass(frozen=True)
class Point:
    """A method in a picture.

    Attributes:
        name: what it is called.
        cost: where it lies across.
        score: the metric.
        competes: whether it is a dot; a control is a line.
        base: whether others are compared with it; then it is named.
        error: standard error of the score, 0 where it is not known.
    """

    name: str
    cost: float
    score: float
    competes: bool = True
    base: bool = False
    error: float = 0.0


def _scatter(named: Named, ranked: Named, metric: str):
    base = usual_baseline(ranked.values())
    scale = base.peak_bytes if base is not None else 2**20
    unit = f"peak memory, over that of {base.method}" if base is not None else "peak memory, MiB"
    shown = {name: row for name, row in named.items() if name in ranked or not row.competes}
    points = [Point(name, row.peak_bytes / scale, row.final, row.competes, row is base) for name, row in shown.items()]
    return scatter(points, unit, metric, next(iter(ranked.values())).higher_is_better)


def scatter(points: Sequence[Point], unit: str, metric: str, higher_is_better: bool):
    """A function that draws the points; named are those that nothing beats in both and the baseline, all where they are few."""
    dots = [one for one in points if one.competes]
    low, high = min(one.score for one in dots), max(one.score for one in dots)
    controls = [one for one in points if not one.competes]
    lines = [one for one in controls if low - FAR * (high - low) <= one.score <= high + FAR * (high - low)]
    away = [f"{one.name} {one.score:.2f}" for one in controls if one not in lines]

    def paint(axes) -> None:
        axis = axes[0][0]
        costs = [one.cost for one in dots]
        on = st.front(costs, [one.score for one in dots], higher_is_better, SAME_MEMORY)
        line = sorted((one.cost, one.score) for one, keep in zip(dots, on, strict=True) if keep)
        axis.plot(*zip(*line, strict=True), color=OTHER, linewidth=1, drawstyle="steps-post", zorder=1)
        for one, keep in zip(dots, on, strict=True):
            look = {"color": FRONT if keep else OTHER, "markersize": 6 if keep else 4, "elinewidth": 1}
            axis.errorbar(one.cost, one.score, one.error or None, fmt="o", zorder=3, **look)
        for one in lines:
            axis.axhline(one.score, color=CONTROL, linewidth=1, linestyle=(0, (5, 3)), zorder=0)
        axis.margins(0.1, 0.14)
        axis.set(xlabel=unit + (f"  (off the scale: {', '.join(away)})" if away else ""), ylabel=metric)
        if max(costs) > 2.5 * statistics.median(costs):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_xlim(0.8 * min(costs), 1.6 * max(costs))
        else:
            axis.set_xlim(0, 1.3 * max(costs))
        shown = [one for one, keep in zip(dots, on, strict=True) if keep or one.base or len(dots) <= MANY]
        _write(axis, [(one.score, one.cost, one.name) for one in shown])
        for one in lines:
            axis.text(axis.get_xlim()[1], one.score, one.name, ha="right", va="bottom", fontsize=8, color=CONTROL)

    return paint


def _write(axis, labels: list[tuple[float, float, str]]) -> None:
    """Names to the right of their points, moved up where they would lie on another."""
    low, high = axis.get_ylim()
    across = axis.transData + axis.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    for score, cost, name in sorted(labels):
        x, y = across.transform((cost, score))
        while any(abs(y - other) < NEAR and abs(x - at) < 0.3 for other, at in placed):
            y += 0.3 * NEAR
        placed.append((y, x))
        axis.annotate(
            name,
            (cost, score),
            (x + 0.014, y),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
            if y > (score - low) / (high - low) + 0.01
            else None,
        )

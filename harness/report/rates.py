"""The learning rates of a grid: the final metric over them, as lines with the seeds and as a map of methods by rates."""

from __future__ import annotations

import math

from dpft.harness.report import rows as making
from dpft.harness.report.figures import look
from dpft.harness.report.rows import Row
from dpft.harness.report.views import Group

AT_MOST = 16  # methods
Grids = list[tuple[str, dict[float, Row]]]


def picture(group: Group):
    """(panels, what paints them); None where no method has two rates."""
    grids = _grids(group)
    if not grids:
        return None

    def paint(axes) -> None:
        _lines(axes[0][0], grids, group)
        if len(grids) > 1:
            _map(axes[0][1], grids, group)

    return min(len(grids), 2), paint


def _grids(group: Group) -> Grids:
    """Method -> rate -> row, of ranked methods with more than one rate."""
    found = making.complete(group.every)
    names = making.names([Row({**rows[0].spec, "lr": None}, rows[0].records) for rows in found])
    grids = [(name, {row.spec["lr"]: row for row in rows}) for name, rows in zip(names, found, strict=True)]
    return [(name, dict(sorted(rows.items()))) for name, rows in grids if len(rows) > 1][:AT_MOST]


def _lines(axis, grids: Grids, group: Group) -> None:
    for i, (name, rows) in enumerate(grids):
        axis.plot(list(rows), [row.final for row in rows.values()], label=name, **look(i))
        for lr, row in rows.items():
            values = list(row.finals.values())
            axis.plot([lr] * len(values), values, "_", color=look(i)["color"], alpha=0.6)
    every = sorted({lr for _, rows in grids for lr in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(every, **_ticks(every))
    axis.set(xlabel="learning rate; dashes: seeds", ylabel=f"final {group.result['metric']}", title=group.spec["task"])
    axis.legend(loc="best" if len(grids) > 1 else "upper left")


def _ticks(rates: list[float]) -> dict:
    return {"labels": [f"{lr:g}" for lr in rates], "rotation": 30 if len(rates) > 4 else 0}  # not over each other


def _map(axis, grids: Grids, group: Group) -> None:
    """Means as colours and numbers; what is better is brighter, what was not run is empty."""
    every = sorted({lr for _, rows in grids for lr in rows})
    means = [[rows[lr].final if lr in rows else math.nan for lr in every] for _, rows in grids]
    known = [value for line in means for value in line if not math.isnan(value)]
    better, low, high = group.result["higher_is_better"], min(known), max(known)
    axis.imshow(means, cmap="cividis" if better else "cividis_r", aspect="auto", vmin=low, vmax=high)
    for i, line in enumerate(means):
        for j, value in enumerate(line):
            if not math.isnan(value):
                share = (value - low) / (high - low or 1.0)
                bright = (share if better else 1 - share) > 0.5
                axis.text(
                    j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color="black" if bright else "white"
                )
    axis.set_xticks(range(len(every)), **_ticks(every))
    axis.set_yticks(range(len(grids)), [name for name, _ in grids])
    axis.set(xlabel="learning rate", title=f"mean of seeds, final {group.result['metric']}")
    axis.grid(False)

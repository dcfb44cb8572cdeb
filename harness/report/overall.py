"""All settings together: one score per run on one scale, its interquartile mean, and performance profiles (2108.13264)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpft.harness import statistics as st
from dpft.harness.report import rows as making
from dpft.harness.report.figures import Figures, look
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import measure_of
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import Group

AT_MOST = 12  # methods in the picture
GRID = 241  # points of a profile


def summary(groups: Sequence[Group], pictures: Figures | None) -> list[Part]:
    """A table of the methods that have a rank in every ranked group, and their profiles; nothing with fewer than two of each."""
    ranked = [group for group in groups if group.reason is None and measure_of(group.rows)]
    scaled = [group for group in ranked if len(set(_ends(group))) == 2]
    scores = _scores(scaled)
    if len(scores) < 2 or len(next(iter(scores.values()))) < 2:
        return []
    middle = {name: float(st.iqm(np.concatenate([*parts]))) for name, parts in scores.items()}
    names = sorted(scores, key=lambda name: -middle[name])
    best = [max(names, key=lambda name: np.mean(scores[name][i])) for i in range(len(scores[names[0]]))]
    cells = []
    for name in names:
        found = st.interval(scores[name], "iqm")
        cells.append(
            {
                "method": name,
                "IQM": f"{middle[name]:.3f}",
                "95% interval": "–" if found is None else f"{found.low:.3f} to {found.high:.3f}",
                "mean": f"{np.mean(np.concatenate([*scores[name]])):.3f}",
                "lowest": f"{np.min(np.concatenate([*scores[name]])):.3f}",
                "best in": f"{best.count(name)} of {len(best)}",
            }
        )
    text = (
        "A run's score is its share of the way from chance (0) to the mean of the best DP baseline of its setting (1); of a "
        "method the best learning rate by the final metric, on the seeds that the ranks are over. IQM: mean of the middle "
        "half of all its runs, settings together; methods without a rank in one of the settings are left out."
    )
    if len(scaled) < len(ranked):
        text += f" Left out for want of such a scale, as their best DP baseline ended at chance: {len(ranked) - len(scaled)}."
    if any(line["95% interval"] == "–" for line in cells):
        text += " No interval with fewer than 6 seeds a setting."
    parts: list[Part] = [f"### All {len(best)} ranked settings together", Table(cells), text]
    if pictures is not None:
        parts.append(f"![Performance profiles]({pictures.draw('profiles.svg', _profiles(names, scores))})")
    return parts


def _ends(group: Group) -> tuple[float, float]:
    """The metric at score 0 and 1 of a setting."""
    return group.result["chance"], making.ordered(measure_of(group.rows))[0].final


def _scores(groups: Sequence[Group]) -> dict[str, list[np.ndarray]]:
    """Method -> per group the scores of its seeds; of methods with one row in each group, baselines with their best one."""
    found: list[dict[str, np.ndarray]] = []
    for group in groups:
        chance, one = _ends(group)
        ranked = [Row({**row.spec, "lr": 0.0}, row.records) for row in group.rows if row.ranked]
        first: dict[str, Row] = {}
        for row, name in zip(ranked, making.names(ranked), strict=True):  # best first: of a baseline's rates the best
            first.setdefault(name, row)
        found.append({n: (np.array(list(r.finals.values())) - chance) / (one - chance) for n, r in first.items()})
    names = set.intersection(*(set(part) for part in found)) if found else set()
    return {name: [part[name] for part in found] for name in sorted(names)}


def _profiles(names: Sequence[str], scores: dict[str, list[np.ndarray]]):
    shown = names[:AT_MOST]
    every = np.concatenate([part for name in shown for part in scores[name]])
    low, high = np.clip([every.min(), every.max()], -0.5, 1.5)
    taus = np.linspace(low - 0.02, high + 0.02, GRID)

    def paint(axes) -> None:
        axis = axes[0][0]
        for i, name in enumerate(shown):
            style = {key: value for key, value in look(i).items() if key != "marker"}
            axis.step(taus, st.profile(scores[name], taus), where="post", label=name, **style)
        axis.set(xlabel="score τ", ylabel="share of runs above τ", ylim=(0, 1.02), xlim=(taus[0], taus[-1]))
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2)

    return paint

"""The pictures of one group of rows: each is drawn only where the records have data for it."""

from __future__ import annotations

import math
from typing import Any

from dpft.harness import statistics as st
from dpft.harness.records.store import Store
from dpft.harness.report import rates
from dpft.harness.report.figures import COLOURS, Figures, look
from dpft.harness.report.pairs import SAME_MEMORY, SAME_TIME
from dpft.harness.report.reading import Curves, diagnostics
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import FRACTION, examples_of, mean_curve, target_of
from dpft.harness.report.views import MIB, Group, hardware

AT_MOST = 14  # rows in one picture, the best and the controls; more cannot be told apart
Named = list[tuple[int, str, Row]]  # place in the order of colours, name, row


def of_group(group: Group, stem: str, curves: Curves, store: Store, figures: Figures, public: bool) -> list[str]:
    """One line of links to the pictures of a group; the files are written where `figures` says."""
    rows = [(i, name, row) for i, (name, row) in enumerate(zip(group.names, group.rows, strict=True))]
    rows = [entry for entry in rows if entry[2].competes][:AT_MOST] + [e for e in rows if not e[2].competes][:AT_MOST]
    high = max(2.2, 0.34 * len(rows) + 1.2)
    made = [
        ("metric by step", "step", _curve(rows, group, curves, "step"), None),
        ("by ε", "epsilon", _curve(rows, group, curves, "epsilon"), None),
        ("steps to threshold", "threshold", _thresholds(rows, group, curves), (6.4, high)),
        ("memory", "memory", _memory(rows), (6.4, high)),
        ("Pareto fronts", "pareto", _pareto(rows, group), None),
        ("learning rates", "lr", rates.picture(group), None),
        ("alignment", "alignment", None if public else _alignment(rows, curves), None),
    ]
    links = []
    for title, kind, draw, size in made:
        if draw is not None:
            panels, paint = draw
            links.append(f"[{title}]({figures.draw(f'{stem}-{kind}.svg', paint, (1, panels), size)})")
    profiled = [] if public else [row for _, _, row in rows if row.spec["decoder"] == "rmt"]
    for row in profiled:
        record = row.records[0]
        if spectra := diagnostics(store, record).get("spectra"):
            record = {**record, "diagnostics": {"alignment_by_parameter": [], "spectra": spectra}}
            links.append(f"[singular values]({spectra_of(record, figures)[1]})")
            break
    return [f"Pictures: {', '.join(links)}."] if links else []


def _legend(axis, entries: int) -> None:
    """Beside the panel, where it hides nothing."""
    if entries:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2)


def _curve(rows: Named, group: Group, curves: Curves, against: str):
    """The metric over steps or over the epsilon spent: mean over seeds, and the range of the seeds as a band."""
    drawn = []
    for i, name, row in rows:
        points = mean_curve(row, curves, "metric")
        x = points if against == "step" else mean_curve(row, curves, "epsilon")
        if len(points) > 1 and x:
            drawn.append((i, name, row, points, [step if against == "step" else x[step] for step in points]))
    if not drawn:
        return None
    target = target_of(group.rows, curves)

    def paint(axes) -> None:
        axis = axes[0][0]
        for i, name, row, points, x in drawn:
            axis.plot(x, list(points.values()), label=name, **look(i))
            seeds = [dict(zip(curve["step"], curve["metric"], strict=True)) for curve in map(curves.of, row.records)]
            if len(seeds) > 1:
                values = [[seed[step] for seed in seeds if step in seed] for step in points]
                axis.fill_between(
                    x, list(map(min, values)), list(map(max, values)), color=look(i)["color"], alpha=0.12, linewidth=0
                )
        for value, said, line in (
            (target and target.value, f"threshold ({FRACTION:.0%})", (0, (5, 2))),
            (group.result["chance"], group.result.get("chance_is", "chance"), (0, (1, 2))),
        ):
            if value is not None:
                axis.axhline(value, color="0.45", linewidth=1, linestyle=line, label=said, zorder=1)
        axis.set(
            xlabel="step" if against == "step" else "ε spent (PRV upper bound)",
            ylabel=f"{group.result['metric']} on {examples_of(group.spec)}",
            title=f"{group.spec['task']}; band: range over seeds" if _several(rows) else group.spec["task"],
        )
        if against == "step":
            _whole(axis)
        _legend(axis, len(drawn))

    return 1, paint


def _whole(axis) -> None:
    """Steps are whole numbers."""
    axis.xaxis.get_major_locator().set_params(integer=True)


def _several(rows: Named) -> bool:
    return any(len(row.records) > 1 for _, _, row in rows)


def _thresholds(rows: Named, group: Group, curves: Curves):
    """A dot per seed, a bar to the median; at the right edge triangles: did not get there, and crosses: cannot be told.

    There is no picture where no seed is known to have got there.
    """
    target = target_of(group.rows, curves)
    if target is None:
        return None
    found = [(i, name, curves.reached(row, target), curves.median_reached(row, target)) for i, name, row in rows]
    end = max(row.spec["steps"] for _, _, row in rows)
    if not any(one is not None and math.isfinite(one.step) for _, _, seeds, _ in found for one in seeds):
        return None

    def paint(axes) -> None:
        axis = axes[0][0]
        edge = 1.06 * end
        for place, (i, _, seeds, middle) in enumerate(found):
            colour = look(i)["color"]
            if middle is not None and math.isfinite(middle.step):
                axis.barh(place, middle.step, height=0.55, color=colour, alpha=0.25)
            marks = sorted((edge, "x") if one is None else (min(one.step, edge), _mark(one)) for one in seeds)
            for n, (x, mark) in enumerate(marks):
                shift = 0.3 * ((n + 0.5) / len(marks) - 0.5)
                face = colour if mark == "o" else "none"
                axis.plot(x, place + shift, mark, color=colour, markerfacecolor=face, clip_on=False)
        axis.set(
            xlim=(0, edge),
            xlabel=f"steps to {group.result['metric']} {target.value:.3f}; bar: median\n"
            f"triangle: not within {end}; cross: the evaluations cannot tell",
            title=group.spec["task"],
        )
        _whole(axis)
        _names(axis, [name for _, name, _, _ in found])

    return 1, paint


def _mark(one: st.Reached) -> str:
    return ">" if math.isinf(one.step) else "o"


def _names(axis, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def _memory(rows: Named):
    """Peak memory by what it holds."""
    kinds = sorted({kind for _, _, row in rows for kind in row.records[0]["cost"]["peak_bytes"]})

    def paint(axes) -> None:
        axis = axes[0][0]
        left = [0.0] * len(rows)
        for n, kind in enumerate(kinds):
            sizes = [row.records[0]["cost"]["peak_bytes"].get(kind, 0) / MIB for _, _, row in rows]
            axis.barh(
                range(len(rows)), sizes, left=left, height=0.7, label=kind.replace("_", " "), color=look(n)["color"],
                hatch="" if n < 7 else "//", edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for place, total in enumerate(left):
            axis.annotate(f"{total:,.0f}", (total, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set(xlabel="peak memory, MiB (first seed)", xlim=(0, 1.12 * max(left)))
        _names(axis, [name for _, name, _ in rows])
        _legend(axis, len(kinds))

    return 1, paint


def _pareto(rows: Named, group: Group):
    """The metric against memory and, of the hardware with most rows, against the time of a step; the line is the front."""
    ranked = [entry for entry in rows if entry[2].ranked]
    if len(ranked) < 2:
        return None
    machines: dict[str, Named] = {}
    for entry in ranked:
        where = {hardware(record) for record in entry[2].records}
        if len(where) == 1 and entry[2].step_s is not None:
            machines.setdefault(where.pop(), []).append(entry)
    panels = [("peak memory, MiB", ranked, lambda row: row.peak_bytes / MIB, SAME_MEMORY)]
    if machines:
        where, timed = max(machines.items(), key=lambda item: (len(item[1]), item[0]))
        if len(timed) > 1:
            panels.append((f"time of a step, s\n{where}", timed, lambda row: row.step_s, SAME_TIME))

    def paint(axes) -> None:
        for axis, (label, entries, cost, tolerance) in zip(axes[0], panels, strict=True):
            costs, scores = [cost(row) for _, _, row in entries], [row.final for _, _, row in entries]
            on = st.front(costs, scores, entries[0][2].higher_is_better, tolerance)
            line = sorted((c, s) for c, s, keep in zip(costs, scores, on, strict=True) if keep)
            axis.plot(*zip(*line, strict=True), color="0.6", linewidth=1, drawstyle="steps-post", zorder=1)
            for (i, name, _), c, s in zip(entries, costs, scores, strict=True):
                axis.plot(c, s, label=name, **{**look(i), "linestyle": "none"}, markersize=7)
            axis.margins(0.12)
            axis.set(xlabel=label, xlim=(0, 1.15 * max(costs)))  # from zero: nearly equal costs look equal
            axis.sharey(axes[0][0])
        axes[0][0].set_ylabel(f"final {group.result['metric']}")
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2)

    return len(panels), paint


def _alignment(rows: Named, curves: Curves):
    """One colour per row, mean over seeds; the release dotted, the update solid."""
    columns = (("alignment_noisy", ":"), ("alignment_decoded", "-"))
    drawn = [(i, name, line, mean_curve(row, curves, key)) for i, name, row in rows for key, line in columns]
    drawn = [entry for entry in drawn if entry[3]]
    if not drawn:
        return None

    def paint(axes) -> None:
        axis = axes[0][0]
        solid = {name for _, name, line, _ in drawn if line == "-"}
        for i, name, line, points in drawn:
            label = name if line == "-" or name not in solid else None
            style = {**look(i), "linestyle": line}
            if i < len(COLOURS):  # the colour is enough
                style["marker"] = None
            axis.plot(list(points), list(points.values()), label=label, **style)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlabel="step", ylabel="cosine to the clean clipped sum", title="dotted: released; solid: decoded")
        _whole(axis)
        _legend(axis, len(drawn))

    return 1, paint


def spectra_of(record: dict[str, Any], figures: Figures) -> tuple[str, str]:
    """The singular values of one run at the first and the last recorded step: (title, link)."""
    spec, spectra = record["spec"], record["diagnostics"]["spectra"]
    title = (
        f"Singular values at step {spectra[0]['step']} and {spectra[-1]['step']} of {spec['method']}, {spec['task']}"
    )
    name = f"{spec['task']}-{spec['method']}-eps{spec['epsilon']:g}-singular-values.svg"
    return title, figures.draw(name, _profiles(spectra), (2, len(spectra[0]["matrices"])))


def _profiles(spectra: list[dict[str, Any]]):
    """A row of panels for the first recorded step and one for the last, a panel per matrix."""
    from dpft.methods.decoders.spectral import bulk_edge

    def draw(axes) -> None:
        for line, taken in zip(axes, (spectra[0], spectra[-1]), strict=True):
            for axis, (name, matrix) in zip(line, taken["matrices"].items(), strict=True):
                for i, (kind, mark) in enumerate((("noisy", "."), ("clean", "-"), ("decoded", "x"))):
                    values = [v if v > 0 else float("nan") for v in matrix[kind] or []]
                    axis.plot(range(1, len(values) + 1), values, mark, color=look(i)["color"], label=kind, markersize=4)
                axis.axhline(
                    bulk_edge(*matrix["shape"], matrix["noise_std"]), color="0.5", linestyle="--", linewidth=0.8
                )
                axis.set(xlabel="index", title=f"{_short(name)}, step {taken['step']}")
                axis.title.set_fontsize(7)
        axes[0][0].set_ylabel("singular value")
        axes[0][0].legend(fontsize=7, title="dashed: edge of the noise", title_fontsize=6)

    return draw


def _short(name: str) -> str:
    return name.removesuffix(".weight").replace("base_model.", "").replace("encoder.layer.", "layer ")

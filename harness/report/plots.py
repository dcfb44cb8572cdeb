"""Pictures beside the tables: alignment over steps, and singular values before and after decoding. SVG, the same every time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from dpft.harness.report.rows import Row, name_of
from dpft.harness.store import Store, atomic

STYLE = "tableau-colorblind10"


@dataclass(frozen=True)
class Figures:
    """folder: where pictures are written, None: nowhere (the text is only compared); link: what the text calls the folder."""

    folder: Path | None
    link: str


def of_group(rows: list[Row], store: Store, figures: Figures) -> list[str]:
    """Markdown images of one group of rows; the files are written where `figures` says."""
    spec = rows[0].spec
    stem = f"{spec['task']}-{spec['model'].replace('/', '-')}" + (
        "" if not rows[0].private else f"-eps{spec['epsilon']:g}"
    )
    found = []
    aligned = [row for row in rows if any(r["diagnostics"]["alignment_by_parameter"] for r in row.records)]
    if aligned:
        title = "Cosine to the clean clipped gradient over steps: released and decoded"
        found.append(
            _image(figures, f"{stem}-alignment.svg", title, lambda axes: _alignment(axes, aligned, rows, store))
        )
    profiled = [row for row in rows if row.spec["decoder"] == "rmt" and row.records[0]["diagnostics"].get("spectra")]
    if profiled:
        found.append(spectra_of(profiled[0].records[0], figures))
    return found


def spectra_of(record: dict[str, Any], figures: Figures) -> str:
    """The singular values of one run at the first and the last recorded step."""
    spec, spectra = record["spec"], record["diagnostics"]["spectra"]
    title = (
        f"Singular values at step {spectra[0]['step']} and {spectra[-1]['step']} of {spec['method']}, {spec['task']}"
    )
    name = f"{spec['task']}-{spec['method']}-eps{spec['epsilon']:g}-singular-values.svg"
    return _image(figures, name, title, _profiles(spectra), (2, len(spectra[0]["matrices"])))


def _image(figures: Figures, name: str, title: str, draw, grid: tuple[int, int] = (1, 1)) -> str:
    if figures.folder is not None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figures.folder.mkdir(parents=True, exist_ok=True)
        settings = {"svg.hashsalt": "dpft", "svg.fonttype": "none", "font.size": 9}
        with pyplot.style.context(STYLE), matplotlib.rc_context(settings), atomic(figures.folder / name) as temporary:
            size = (max(7.5, 3.2 * grid[1]), max(4.0, 2.6 * grid[0]))
            figure, axes = pyplot.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
            try:
                draw(axes)
                figure.savefig(temporary, format="svg", metadata={"Date": None})
            finally:
                pyplot.close(figure)
    return f"![{title}]({figures.link}/{name})"


def _alignment(axes, aligned: list[Row], rows: list[Row], store: Store) -> None:
    """One colour per row, mean over seeds; the release dashed, the update solid."""
    axis = axes[0][0]
    for i, row in enumerate(aligned):
        for column, line in (("alignment_noisy", ":"), ("alignment_decoded", "-")):
            points: dict[int, list[float]] = defaultdict(list)
            for record in row.records:
                curve = store.curve(record["run_id"])
                for step, value in curve.filter(curve[column].is_not_null()).select("step", column).iter_rows():
                    points[step].append(value)
            if points:
                steps = sorted(points)
                label = name_of(row, rows) if line == "-" else None
                axis.plot(steps, [mean(points[s]) for s in steps], line, color=f"C{i % 10}", label=label, linewidth=1.5)
    axis.set(xlabel="step", ylabel="cosine to the clean clipped sum")
    axis.set_title("dotted: released; solid: decoded", fontsize=8)
    if axis.lines:
        axis.legend(fontsize=7, ncols=2)
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)


def _profiles(spectra: list[dict[str, Any]]):
    """A row of panels for the first recorded step and one for the last, a panel per matrix."""
    from dpft.methods.decoders.spectral import bulk_edge

    def draw(axes) -> None:
        for line, taken in zip(axes, (spectra[0], spectra[-1]), strict=True):
            for axis, (name, matrix) in zip(line, taken["matrices"].items(), strict=True):
                for i, (kind, mark) in enumerate((("noisy", "."), ("clean", "-"), ("decoded", "x"))):
                    values = [v if v > 0 else float("nan") for v in matrix[kind] or []]
                    axis.plot(range(1, len(values) + 1), values, mark, color=f"C{i}", label=kind, markersize=4)
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

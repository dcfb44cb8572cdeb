"""How pictures look and where they go: one style for all, SVG, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpft.harness.records.store import atomic
from dpft.harness.report.views import Group

# Okabe and Ito's colours, told apart with any colour vision; without their yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.dpi": 100,
    "font.size": 9,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "dpft",
}
NEUTRAL = {  # one picture for light and dark pages
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "#767676"),
    "grid.color": "#76767640",
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Figures:
    """folder: where pictures are written, None: nowhere (the text is only compared); link: what the text calls the folder."""

    folder: Path | None
    link: str

    def draw(
        self,
        name: str,
        draw: Callable,
        grid: tuple[int, int] = (1, 1),
        size: tuple[float, float] | None = None,
        neutral: bool = False,
    ) -> str:
        """Make the picture `name` with `draw(axes)`, axes an array of the shape `grid`; returns the link to it.

        neutral: no background, and lines and text that show on light and on dark ones.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with canvas(grid, size, neutral) as (figure, axes), atomic(self.folder / name) as temporary:
                draw(axes)
                figure.savefig(temporary, format="svg", metadata={"Date": None})
        return f"{self.link}/{name}"


@contextmanager
def canvas(grid: tuple[int, int], size: tuple[float, float] | None, neutral: bool = False):
    """A figure and its axes in the style of all pictures, closed afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE | (NEUTRAL if neutral else {})):
        size = size or (max(6.4, 3.2 * grid[1]), max(3.8, 2.6 * grid[0]))
        figure, axes = pyplot.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def look(i: int) -> dict[str, str]:
    """Colour, line and mark of the i-th row: 7 colours, then other lines and marks."""
    turn = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[turn % len(LINES)],
        "marker": MARKS[(i + turn) % len(MARKS)],
    }


def stems(groups: Sequence[Group]) -> list[str]:
    """The beginnings of the names of each group's files, all different."""
    found: list[str] = []
    for group in groups:
        same = sum(other.rpartition("--")[0] == group.stem or other == group.stem for other in found)
        found.append(f"{group.stem}--{same + 1}" if same else group.stem)
    return found

"""The noise of a run as it is seen where no canary is: what is noted of every step, in planned standard deviations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
import torch

SAMPLE = 512  # coordinates of each parameter whose noise is kept, to compare steps and parameters with each other
CLOSE = 1e-5  # standard deviations: two entries so close may be one draw, rounded twice
FEW = (
    100  # quiet coordinates of a step; with fewer, what the batch adds is subtracted and all coordinates are looked at
)
# of |z|, z standard normal with density f on the positive half: the integrals of f^2 and f^3
SQUARED, CUBED = 1 / numpy.pi**0.5, 2 / (numpy.pi * 3**0.5)


@dataclass
class Noise:
    """T steps, P parameters. All [T, P] and [T, k] arrays are of the coordinates that were quiet: there was only noise.

    squares, counts: [T, P], sum and number of squared entries. kept, quiet: [T, k], entries at k coordinates that stay the same
    from step to step, and whether there was only noise; columns: parameter and encoded size -> its part of the k, for a
    parameter may have another encoded shape in another phase. largest: [T], the largest magnitude. close: [T, 3], pairs of
    entries within CLOSE of each other (in magnitude), and their expected number and variance. inner, own, common: [P, P], over
    the first SAMPLE entries of two parameters side by side: sums of products, of squares of the first, and number.
    """

    squares: numpy.ndarray
    counts: numpy.ndarray
    kept: numpy.ndarray
    quiet: numpy.ndarray
    columns: dict[tuple[str, int], slice]
    largest: numpy.ndarray
    close: numpy.ndarray
    inner: numpy.ndarray
    own: numpy.ndarray
    common: numpy.ndarray

    def rescaled(self, factor: numpy.ndarray) -> Noise:
        """The same in other units: entries of step t times factor[t]."""
        across = factor[:, None]
        return Noise(
            squares=self.squares * across**2,
            counts=self.counts,
            kept=self.kept * across,
            quiet=self.quiet,
            columns=self.columns,
            largest=self.largest * factor,
            close=self.close,
            inner=self.inner,
            own=self.own,
            common=self.common,
        )


@dataclass
class Notes:
    """Collects Noise step by step; the coordinates that are kept come from a generator of its own."""

    squares: list[list[float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    kept: list[dict[tuple[str, int], tuple[numpy.ndarray, numpy.ndarray]]] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    close: list[tuple[float, float, float]] = field(default_factory=list)
    sums: numpy.ndarray | float = 0.0
    chosen: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(20))

    def add(self, sizes: dict[str, int], entries: torch.Tensor, quiet: torch.Tensor) -> None:
        """One step: entries and whether they are noise alone, [coordinates], of parameters (with encoded sizes) side by side."""
        parts = list(zip(sizes, entries.split([*sizes.values()]), quiet.split([*sizes.values()]), strict=True))
        self.squares.append([float(values[mask].double().square().sum()) for _, values, mask in parts])
        self.counts.append([int(mask.sum()) for _, _, mask in parts])
        self.kept.append({})
        for name, values, mask in parts:
            chosen = self._picks(name, len(values))
            self.kept[-1][name, len(values)] = ((values * mask)[chosen].numpy(), mask[chosen].numpy())
        only = entries[quiet].double()
        self.largest.append(float(only.abs().max()) if len(only) else 0.0)
        self.close.append(_close(only.abs().numpy()))
        first = torch.zeros(len(parts), SAMPLE, dtype=torch.float64)
        there = torch.zeros_like(first)
        for row, (_, values, mask) in enumerate(parts):
            width = min(SAMPLE, len(values))
            first[row, :width], there[row, :width] = (values * mask)[:width], mask[:width].double()
        self.sums = self.sums + torch.stack([first @ first.T, first**2 @ there.T, there @ there.T]).numpy()

    def collected(self) -> Noise:
        """What was noted of all steps."""
        columns, start = {}, 0
        for key, chosen in self.chosen.items():
            columns[key] = slice(start, start + len(chosen))
            start += len(chosen)
        kept = numpy.zeros((len(self.kept), start), dtype=numpy.float32)
        quiet = numpy.zeros((len(self.kept), start), dtype=bool)
        for step, parts in enumerate(self.kept):
            for key, (values, mask) in parts.items():
                kept[step, columns[key]], quiet[step, columns[key]] = values, mask
        return Noise(
            numpy.array(self.squares),
            numpy.array(self.counts),
            kept,
            quiet,
            columns,
            numpy.array(self.largest),
            numpy.array(self.close),
            *self.sums,
        )

    def _picks(self, name: str, size: int) -> torch.Tensor:
        if (name, size) not in self.chosen:
            self.chosen[name, size] = torch.randperm(size, generator=self.generator)[:SAMPLE]
        return self.chosen[name, size]


def _close(magnitudes: numpy.ndarray) -> tuple[float, float, float]:
    """(pairs of magnitudes within CLOSE, expected of independent normal draws, variance); exact zeros are no draws.

    Normal of whatever standard deviation these have. n draws have n(n-1)/2 pairs, each close with probability 2 CLOSE E f and
    given one of the two with 2 CLOSE f: the variance of that conditional probability enters n(n-1)(n-2) times.
    """
    drawn = numpy.sort(magnitudes[magnitudes > 0])
    n = len(drawn)
    if n < 2:
        return 0.0, 0.0, 0.0
    drawn /= numpy.sqrt(numpy.mean(drawn**2))
    found = int((numpy.searchsorted(drawn, drawn + CLOSE, side="right") - numpy.arange(1, n + 1)).sum())
    chance = 2 * CLOSE * SQUARED
    pairs = n * (n - 1) / 2
    together = n * (n - 1) * (n - 2) * (2 * CLOSE) ** 2 * (CUBED - SQUARED**2)
    return float(found), pairs * chance, pairs * chance * (1 - chance) + together

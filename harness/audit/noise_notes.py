"""The noise of a run as it is seen where no canary is: what is noted of every step, in planned standard deviations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
import torch

from dpft.harness.train.mechanism import BESIDE

SAMPLE = 512  # coordinates of each parameter whose noise is kept, to compare steps and parameters with each other
CLOSE = 1e-5  # standard deviations: two entries so close may be one draw, rounded twice
# quiet coordinates of a release in a step; with fewer, what the batch adds is subtracted and all coordinates are looked at
FEW = 100
ANY = -1  # in place of an encoded size: of whatever size
SIZES = 4  # encoded sizes of one parameter that get picks of their own; of others the first SAMPLE coordinates are kept
# of |z|, z standard normal with density f on the positive half: the integrals of f^2 and f^3
SQUARED, CUBED = 1 / numpy.pi**0.5, 2 / (numpy.pi * 3**0.5)


Part = tuple[str, str]  # release and tensor


@dataclass
class Noise:
    """T steps, P parts, a tensor of a release each. All is of coordinates that were quiet: there was only noise.

    Attributes:
        parts: [P], (release, tensor).
        squares, counts: [T, P], sum and number of squared entries.
        kept, quiet: [T, k], entries at k coordinates that stay the same from step to step, and whether there was only noise.
        columns: part and encoded size -> its part of the k; a parameter may have another encoded shape in another phase.
        picks: the same -> the coordinates.
        largest: [T], the largest magnitude.
        close: [T, 3], pairs of entries within CLOSE of each other (in magnitude), and their expected number and variance.
        inner, own, common: [P, P], over the first SAMPLE entries of two parts side by side: sums of products, of squares of the
            first, and number.
    """

    parts: list[Part]
    squares: numpy.ndarray
    counts: numpy.ndarray
    kept: numpy.ndarray
    quiet: numpy.ndarray
    columns: dict[tuple[Part, int], slice]
    picks: dict[tuple[Part, int], torch.Tensor]
    largest: numpy.ndarray
    close: numpy.ndarray
    inner: numpy.ndarray
    own: numpy.ndarray
    common: numpy.ndarray

    @property
    def releases(self) -> dict[str, numpy.ndarray]:
        """Release -> which parts are its own, [P]; numbers beside a gradient count as a release."""
        names = [part[1] if part[1] == BESIDE else part[0] for part in self.parts]
        return {name: numpy.array([other == name for other in names]) for name in dict.fromkeys(names)}

    def key(self, part: Part, size: int) -> tuple[Part, int]:
        """Of `columns` and `picks`."""
        return (part, size) if (part, size) in self.columns else (part, ANY)


@dataclass
class Notes:
    """Collects Noise step by step; the coordinates that are kept come from a generator of its own."""

    steps: list[dict[Part, tuple[float, int]]] = field(default_factory=list)
    kept: list[dict[tuple[Part, int], tuple[numpy.ndarray, numpy.ndarray]]] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    close: list[tuple[float, float, float]] = field(default_factory=list)
    parts: dict[Part, int] = field(default_factory=dict)
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(3, 0, 0, dtype=torch.float64))
    chosen: dict[tuple[Part, int], torch.Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(20))

    def add(self, sizes: dict[Part, int], entries: torch.Tensor, quiet: torch.Tensor) -> None:
        """One step: entries and whether they are noise alone, [coordinates], of parts (with encoded sizes) side by side."""
        split = list(zip(sizes, entries.split([*sizes.values()]), quiet.split([*sizes.values()]), strict=True))
        self.steps.append({part: (float(v[mask].double().square().sum()), int(mask.sum())) for part, v, mask in split})
        self.kept.append({})
        for part, values, mask in split:
            key = self._key(part, len(values))
            self.kept[-1][key] = picked(values * mask, self.chosen[key]), picked(mask, self.chosen[key])
        only = entries[quiet].double()
        self.largest.append(float(only.abs().max()) if len(only) else 0.0)
        self.close.append(_close(only.abs().numpy()))
        for part in sizes:
            self.parts.setdefault(part, len(self.parts))
        first = torch.zeros(len(self.parts), SAMPLE, dtype=torch.float64)
        there = torch.zeros_like(first)
        for part, values, mask in split:
            row, width = self.parts[part], min(SAMPLE, len(values))
            first[row, :width], there[row, :width] = (values * mask)[:width], mask[:width].double()
        grown, self.sums = self.sums, torch.stack([first @ first.T, first**2 @ there.T, there @ there.T])
        self.sums[:, : grown.shape[1], : grown.shape[2]] += grown

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
        sums = numpy.array([[step.get(part, (0.0, 0)) for part in self.parts] for step in self.steps])
        sums = sums.reshape(len(self.steps), len(self.parts), 2)
        return Noise(
            list(self.parts),
            sums[..., 0],
            sums[..., 1].astype(int),
            kept,
            quiet,
            columns,
            self.chosen,
            numpy.array(self.largest),
            numpy.array(self.close),
            *self.sums.numpy(),
        )

    def _key(self, part: Part, size: int) -> tuple[Part, int]:
        if (part, size) not in self.chosen:
            if sum(other == part for other, _ in self.chosen) >= SIZES:
                self.chosen[part, ANY] = torch.arange(SAMPLE)
                return part, ANY
            self.chosen[part, size] = torch.randperm(size, generator=self.generator)[:SAMPLE]
        return part, size


def picked(values: torch.Tensor, chosen: torch.Tensor) -> numpy.ndarray:
    """Those of `values` [size]; zero where `chosen` goes beyond them."""
    found = values.new_zeros(len(chosen))
    inside = chosen < len(values)
    found[inside] = values[chosen[inside]]
    return found.numpy()


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

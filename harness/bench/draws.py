"""Ways to draw Gaussian noise: how far each reaches, and what it takes. For `dpft noise --tail` and `dpft bench --noise`."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy
import torch

from dpft.harness.train import noise

SIZE = noise.PIECE  # numbers a call, as dpft draws them
EDGE = 4.0  # of the candidate that draws again what lies beyond


@dataclass(frozen=True)
class Way:
    """reach: the largest draw that the algorithm can make; fill: draw SIZE numbers, [SIZE]."""

    name: str
    how: str
    reach: float
    fill: Callable[[], torch.Tensor]


def box_muller(bits: float) -> float:
    """The largest Gaussian from a smallest uniform number of 2^-bits."""
    return math.sqrt(2 * bits * math.log(2))


def libraries() -> Iterator[Way]:
    """What libraries found on this machine draw when they are asked for Gaussian noise, dpft last."""
    buffer = torch.empty(SIZE)
    yield Way("torch, CPU, fp32", "Box-Muller, 24 bits", box_muller(24), buffer.normal_)
    yield Way(
        "torch, CPU, float64", "Box-Muller, 53 bits", box_muller(53), torch.empty(SIZE, dtype=torch.float64).normal_
    )
    if torch.cuda.is_available():
        device = torch.empty(SIZE, device="cuda")
        yield Way("torch, CUDA, fp32", "Box-Muller, 33 bits", box_muller(33), device.normal_)
    if importlib.util.find_spec("opacus"):
        from opacus.optimizers.optimizer import _generate_noise

        opacus = functools.partial(_generate_noise, 1.0, buffer)
        yield Way("Opacus, CPU", "torch, fp32", box_muller(24), opacus)
        secure = functools.partial(_generate_noise, 1.0, buffer, secure_mode=True)
        yield Way("Opacus, CPU, secure_mode", "half the sum of 4 of torch, fp32", 2 * box_muller(24), secure)
    random = numpy.random.default_rng()
    yield Way(
        "numpy, float64", "ziggurat, 53 bits", ziggurat(53), lambda: torch.from_numpy(random.standard_normal(SIZE))
    )
    single = functools.partial(random.standard_normal, SIZE, numpy.float32)
    yield Way("numpy, float32", "ziggurat, 24 bits", ziggurat(24), lambda: torch.from_numpy(single()))
    if importlib.util.find_spec("jax"):
        yield _jax()
    yield _ours()


def candidates() -> Iterator[Way]:
    """What was weighed for dpft's noise on a CPU, PyTorch's fp32 draws first and dpft's own last."""
    buffer, other = torch.empty(SIZE), torch.empty(SIZE)
    double = torch.empty(SIZE, dtype=torch.float64)

    def redrawn() -> torch.Tensor:
        buffer.normal_()
        far = (buffer.abs() > EDGE).nonzero().flatten()
        tail = torch.rand(len(far), dtype=torch.float64).mul_(math.erfc(EDGE / math.sqrt(2)) / 2).clamp_min_(1e-300)
        buffer[far] = torch.special.ndtri(tail).neg_().mul_(buffer[far].sign()).float()
        return buffer

    yield Way("torch, fp32", "24 bits", box_muller(24), buffer.normal_)
    yield Way("torch, fp32, beyond 4 again", "each alone, in float64", 9.4, redrawn)
    yield Way(
        "sum of two, fp32",
        "24 bits each",
        math.sqrt(2) * box_muller(24),
        lambda: buffer.normal_().add_(other.normal_()).mul_(0.5**0.5),
    )
    yield Way("torch, float64", "53 bits", box_muller(53), lambda: buffer.copy_(double.normal_()))
    for name in ("SFC64", "Philox"):
        random = numpy.random.Generator(getattr(numpy.random, name)())
        fill = functools.partial(random.standard_normal, out=double.numpy())
        yield Way(
            f"numpy, {name}, float64",
            "ziggurat, 53 bits",
            ziggurat(53),
            lambda fill=fill: buffer.copy_(torch.from_numpy(fill())),
        )
    yield _ours()


def ziggurat(bits: int) -> float:
    """The largest draw of numpy's ziggurat: r + log(2^bits) / r, where the acceptance test lets it pass (Doornik, 2005)."""
    start, largest = 3.6541528853610088, bits * math.log(2)
    return start + min(largest / start, math.sqrt(2 * largest))


def _ours() -> Way:
    scratch, pieces = noise.Scratch(os.urandom(32)), itertools.count()
    return Way("dpft, CPU", "Box-Muller, 64 bits", box_muller(64), lambda: scratch.draw("gaussian", next(pieces), SIZE))


def _jax() -> Way:
    import jax

    keys = iter(lambda: numpy.random.default_rng().integers(2**31), None)
    draw = jax.jit(lambda key: jax.random.normal(key, (SIZE,)))
    largest = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(1 - 2.0**-24, dtype=torch.float64)))
    return Way(
        "jax, CPU, fp32", "inverse error function, 24 bits", largest,
        lambda: torch.from_numpy(numpy.array(draw(jax.random.key(int(next(keys)))))),
    )  # fmt: skip


def largest(way: Way, draws: int, progress: Callable[[int], None] = lambda drawn: None) -> float:
    """The largest magnitude in about that many draws; progress: told how many more there are."""
    seen = 0.0
    for done in range(0, draws, SIZE):
        low, high = way.fill().aminmax()
        seen = max(seen, -float(low), float(high))
        progress(min(SIZE, draws - done))
    return seen


def compare(rounds: int) -> list[dict[str, str | float]]:
    """The candidates for a CPU on one thread, times as ratios to the first of the same round: median, least and most."""
    ways, threads = list(candidates()), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = times(ways, rounds)
    finally:
        torch.set_num_threads(threads)
    first = found[ways[0].name]
    rows = []
    for way in ways:
        ratios = [own / base for own, base in zip(found[way.name], first, strict=True)]
        time = {"time": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows.append({"draws": way.name, "by": way.how, "reach": way.reach, **time})
    return rows


def markdown(rows: list[dict[str, str | float]]) -> str:
    """What `compare` found, as a table."""
    from tabulate import tabulate

    cells = [
        [row["draws"], row["by"], f"{row['reach']:.2f}", f"{row['time']:.2f} ({row['least']:.2f}-{row['most']:.2f})"]
        for row in rows
    ]
    return tabulate(cells, headers=["draws", "by", "reach", "time"], tablefmt="github", disable_numparse=True)


def times(ways: list[Way], rounds: int, calls: int = 50) -> dict[str, list[float]]:
    """Seconds a draw by way and round; the ways take turns, so that the machine's mood is shared."""
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            way.fill()
            spent = []
            for _ in range(calls):
                start = time.perf_counter()
                way.fill()
                spent.append(time.perf_counter() - start)
            found[way.name].append(statistics.median(spent) / SIZE)
    return found

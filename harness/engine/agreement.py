"""Is what an engine adds to a sum what plain autograd finds of each example alone?

Before the first step of every phase of a method (and of a resumed run; once for runs of a process that differ in seed, rate and
noise alone) `check` asks it of up to ROWS examples of the real batch:
the clipped sum as a vector, every loss and norm, and whether an example's loss depends on its company. In the steps 1, 4, 16,
64, ... after it `compare` asks LATER examples again, and what the step itself took them for in their real microbatches. On a CPU,
full fine-tuning of MiniLM, the first takes the time of about 150 examples of a step, the second of about 25: with batches of 256
under 1% of a run of 100 steps. Which steps and places is public; no result is kept but a refusal, which ends the run with
status `error` and is a diagnostic: like `diverged` it is not covered by epsilon.

What fp32 denies is asked again in float64, and holds if it holds there: beside a kink (ReLU at 0, the larger of two in a max
pool) rounding decides which gradient an example has, and kernels round differently for one example and for many. What half
precision denies is asked again in fp32: on SmolLM2 with a trained prompt, bf16 moves an example's norm by up to 1.7 times, and
the norm in company is up to 1.3 times that of the same example alone. Two things must then hold in half precision, where rounding
is no excuse: examples do not touch each other, and as a batch of one each is to the engine what it is to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dpft.harness.engine.base import Batch, Engine, RunningSums, Sums, example_gradient, undrawn
from dpft.harness.engine.clipping import limits
from dpft.harness.engine.mixing import companies, depends_on_others
from dpft.harness.engine.refusals import advice, causes, disagreement
from dpft.harness.engine.wider import asked_again
from dpft.harness.errors import CannotRun
from dpft.harness.query.encoding import Encoding
from dpft.harness.query.queries import Bound

ROWS, LATER = 16, 4
# What rounding can explain. Of a clipped sum: the length of the difference, relative to the largest contribution of one example
# (never above C). In fp32 5e-6 is the most that was seen, on 11 models; in bf16 .026 on MiniLM with adapters, where an example's
# gradient is itself known to a percent only; what is looked for is wrong by whole factors. FLOOR: what is far below C, and a
# group that is a small part of a gradient, may differ by the tolerance times FLOOR of that, a loss near 0 by the tolerance times
# LEAST_LOSS.
# An engine may take a norm for too large by up to CHARGED, as the factored one does where gradients cancel: it clips more.
TOLERANCE, HALF_TOLERANCE, CHARGED = 1e-3, 0.2, 5e-2
# What a step found in half precision may be up to HALF_STEP from what is found of the same examples together.
FLOOR, LEAST_LOSS, HALF_STEP = 1e-2, 0.1, 0.5


def due(step: int, phases: Sequence[int]) -> bool:
    """Whether `compare` is due: 1, 4, 16, 64, ... steps after a phase began."""
    since = step - max((start for start in phases if start <= step), default=0)
    return since.bit_count() == 1 and since.bit_length() % 2 == 1


def check(
    engine: Engine,
    batch: Batch,
    encodings: dict[str, Encoding],
    bound: Bound = 1.0,
    alone: Sequence[Batch] | None = None,
    half: bool = False,
) -> bool:
    """Compare the engine with plain autograd on `batch`; nothing is trained, and nothing is left changed. False: values are not
    finite, so nothing can be said, and the loop deals with them.

    encodings, bound: those of the step, so that what is compared is what will be clipped, and takes no more room. alone:
    each example as a batch of one (with no more padding than it needs itself); default: the rows of `batch`. half: whether
    layers compute in half precision.

    Parameters that are all zero (a fresh head, LoRA's B) hold random values meanwhile: nothing would flow past them. Random
    numbers are drawn from PyTorch's global generators as if nothing had happened.
    Raises CannotRun when the clipped sum, a loss or a norm differs, when an example's loss has a derivative by another one's
    input, or when its loss or norm is another one in other company: examples left out, replaced, or in another order.
    """

    told = False

    def ask(batch: Batch, alone: Sequence[Batch] | None, half: bool) -> None:
        nonlocal told
        with undrawn(engine.parameters), _filled(engine):
            told = _check(engine, batch, encodings, bound, alone, half)

    def singly() -> None:
        with undrawn(engine.parameters), _filled(engine):
            _refuse_mixing(engine, batch)
            _singly(engine, batch, encodings, bound, alone)

    asked_again(ask, singly, engine.model, batch, alone, half)
    return told


def compare(
    engine: Engine,
    batch: Batch,
    encodings: dict[str, Encoding],
    bound: Bound,
    alone: Sequence[Batch] | None,
    half: bool,
    losses: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    """As `check`, in the middle of a run, on few examples and at the weights as they are; no question about their company but:

    losses, norms: [batch], [batch, groups], what the step found of these examples in their real microbatches.
    """

    first: tuple[torch.Tensor, torch.Tensor] | None = None
    explained = HALF_STEP if half else TOLERANCE

    def ask(batch: Batch, alone: Sequence[Batch] | None, half: bool) -> None:
        nonlocal first
        with undrawn(engine.parameters):
            total = RunningSums(engine.parameters, encodings)
            found = engine.accumulate(batch, total, bound, encodings)
            step = losses, norms
            if first is not None:  # asked again: so are the step's, where they are those of the first answer
                step = tuple(
                    torch.where(torch.isclose(old, before, rtol=explained, atol=0.0), now.to(old.dtype), old)
                    for old, before, now in zip(step, first, found, strict=True)
                )
            else:
                first = found
            _compare(engine, batch, encodings, bound, alone, half, total.complete(), [found, step])

    def singly() -> None:
        with undrawn(engine.parameters):
            _singly(engine, batch, encodings, bound, alone)

    asked_again(ask, singly, engine.model, batch, alone, half)


def _check(engine, batch: Batch, encodings, bound: Bound, alone, half: bool) -> bool:
    total, engine.agreed = RunningSums(engine.parameters, encodings), True  # `agree` asks less
    losses, norms = engine.accumulate(batch, total, bound, encodings)
    if not (torch.isfinite(losses).all() and torch.isfinite(norms).all()):
        return False
    _compare(engine, batch, encodings, bound, alone, half, total.complete(), [(losses, norms)])
    del total
    if not engine.batched:
        return True
    _refuse_mixing(engine, batch)
    for other, kept, places in companies(batch):
        found = engine.accumulate(other, RunningSums(engine.parameters, encodings), bound, encodings)
        for what, before, after in zip(("loss", "gradient"), (losses, norms), found, strict=True):
            floor = _floor(engine, bound, before[places], before) if what == "gradient" else LEAST_LOSS
            if not _alike(after[kept], before[places], _tolerance(half), floor):
                raise disagreement(engine, f"has another {what} when the others of its batch are exchanged")
    return True


def _refuse_mixing(engine: Engine, batch: Batch) -> None:
    where = depends_on_others(engine, batch) if engine.batched else None
    if where is not None:
        raise CannotRun(
            f"An example's loss depends on another example of its batch, by {where}: the model mixes examples, so no "
            f"gradient is one example's; {advice(engine, mixes=True)}."
        )


def _singly(engine: Engine, batch: Batch, encodings, bound: Bound, alone) -> None:
    """Compare each example as a batch of one, in half precision: the engine sees the very numbers that autograd sees."""
    for i in range(len(next(iter(batch.values())))):
        example = _single(batch, alone, i)
        total = RunningSums(engine.parameters, encodings)
        found = engine.accumulate(example, total, bound, encodings)
        _compare(engine, example, encodings, bound, None, True, total.complete(), [found])


def _compare(engine, batch, encodings, bound, alone, half, total: Sums, found) -> None:
    """Take the clipped gradient of every example alone away from `total`: nothing may be left. found: (losses, norms) to hold."""
    clip_norm, tolerance, largest, slack = engine.ball(bound), _tolerance(half), 0.0, 0.0
    for i in range(len(found[0][0])):
        example = _single(batch, alone, i)
        with engine.plain():
            loss, gradient = example_gradient(engine, example, encodings)
        squares = {name: _length(g).square()[None] for name, g in gradient.items()}
        factors, norm = engine.clip(squares, bound)
        if not (torch.isfinite(loss) and torch.isfinite(norm).all()):
            raise disagreement(engine, "is finite in its batch and not alone")
        for losses, norms in found:
            floor, above = _floor(engine, bound, norm, norms)[0], max(tolerance, CHARGED)
            same_loss = _alike(losses[i], loss, tolerance, LEAST_LOSS)
            if same_loss and _alike(norms[i], norm[0], tolerance, floor, above):
                continue
            if not engine.batched and _is_random(engine, example):
                return  # one example at a time: dropout mixes nothing, but nothing can be compared
            what = "gradient" if same_loss else "loss"
            raise disagreement(engine, f"has another {what} in its batch than alone")
        lengths = norm[0] * torch.stack([factors[names[0]][0] for names in engine.members.values()])
        added = float(_length(lengths))
        if added > clip_norm * (1 + tolerance):
            raise disagreement(engine, f"adds {added / clip_norm:.3g} times the clip norm")
        largest = max(largest, added)
        slack += float(_length(lengths * (found[0][1][i] / norm[0].clamp_min(1e-30) - 1).clamp_min(0)))
        for name, g in gradient.items():
            total[name].sub_(g, alpha=float(factors[name][0]))
        del gradient
    left = {name: float(_length(t)) for name, t in total.items()}
    distance = math.sqrt(sum(value**2 for value in left.values()))
    scale = max(largest, FLOOR * clip_norm) if math.isfinite(clip_norm) else largest
    if not distance <= tolerance * scale + min(slack, CHARGED * scale):
        worst = max(left, key=left.get)
        of = f"{distance / clip_norm:.2g} C" if math.isfinite(clip_norm) else f"{distance / largest:.2g} of an example"
        raise CannotRun(
            f"The clipped sum of {len(found[0][0])} examples is {of} away from that of each example alone, most of it in "
            f"{worst}: {causes(engine)}; {advice(engine)}."
        )


def agree(
    engine: Engine,
    batch: Batch,
    encodings: dict[str, Encoding],
    losses: torch.Tensor,
    squares: dict[str, torch.Tensor],
    half: bool,
) -> bool:
    """Compare up to four examples of `batch` with plain autograd on each alone: the loss, and every parameter's squared norm.

    The factored engine asks it of its first batch, wherever it is used, and it names the parameter that is wrong. losses, squares
    (by parameter): [batch], as the engine found them; half: whether layers compute in half precision. Raises CannotRun when
    they differ; False when nothing can be said: values that are not finite (which the loop deals with) or gradients that are
    zero.
    """
    size = len(losses)
    tolerance, told = max(_tolerance(half), CHARGED), False
    for i in sorted({0, 1, size // 2, size - 1}):
        loss, gradient = example_gradient(engine, _single(batch, None, i), encodings)
        expected = {name: float(g.double().square().sum()) for name, g in gradient.items()}
        whole = sum(expected.values())
        found = {name: float(squares[name][i]) for name in expected}
        if not torch.isfinite(torch.tensor([float(loss), float(losses[i]), whole, sum(found.values())])).all():
            return False
        told = told or whole > 0
        if not _alike(losses[i], loss, tolerance, LEAST_LOSS):
            raise disagreement(engine, "has another loss in its batch than alone")
        for name, square in expected.items():
            if abs(found[name] - square) > 2 * tolerance * (square + FLOOR * whole):
                times = math.sqrt(found[name] / square) if square > 0 else math.inf
                raise disagreement(engine, f"has a gradient of {name} of {times:.4g} times the norm it has alone")
    return told


def _single(batch: Batch, alone: Sequence[Batch] | None, i: int) -> Batch:
    """Example i as a batch of one: the one that is given, or its row."""
    return {key: value[i : i + 1] for key, value in batch.items()} if alone is None else alone[i]


def _alike(
    found: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float,
    floor: float | torch.Tensor,
    above: float | None = None,
) -> bool:
    """Whether all of `found` are as expected, to the tolerance times their size or `floor`. above: another tolerance upwards."""
    found, expected = found.detach().double(), expected.detach().double()
    difference, scale = found - expected, expected.abs().clamp_min(floor)
    return bool(((difference >= -tolerance * scale) & (difference <= (above or tolerance) * scale)).all())


def _length(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)  # makes no copy in float64


def _floor(engine: Engine, bound: Bound, of: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The size [n, groups] to which norms `of` [n, groups] are held at least. norms: of the batch, where nothing is clipped."""
    limit = of.new_tensor(limits(bound, engine.groups))
    if not math.isfinite(engine.ball(bound)):
        limit = limit.clamp_max(float(norms.max()))
    return FLOOR * torch.maximum(limit, torch.linalg.vector_norm(of, dim=1, keepdim=True))


def _tolerance(half: bool) -> float:
    return HALF_TOLERANCE if half else TOLERANCE


@torch.no_grad()
def _is_random(engine: Engine, example: Batch) -> bool:
    with engine.plain():
        return bool(engine.losses(example).ne(engine.losses(example)).any())


@contextmanager
def _filled(engine: Engine) -> Iterator[None]:
    """Parameters that are all zero hold random values inside."""
    zeros = [p for p in engine.parameters.values() if not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()

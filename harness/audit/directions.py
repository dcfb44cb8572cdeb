"""What each canary is to add to a release: by torch.func, published formulas and its own forward passes, by no engine's code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dpft.harness.engine.base import WEIGHTS
from dpft.harness.engine.clipping import Clipping
from dpft.harness.query.preview import first_questions
from dpft.harness.query.queries import Bound, Gradients, Nothing, Query, Seen, Values, named
from dpft.harness.train.batches import batch_of
from dpft.harness.train.core import encodings_of
from dpft.harness.train.mechanism import BESIDE
from dpft.harness.train.parts import Setup

GAMMA = 0.01  # of auto-s and psac, as published


@dataclass(frozen=True)
class Contributions:
    """What n canaries are to add to the answer of one question, fp32, in units of its bound.

    Attributes:
        rows: [n, coordinates], all that is released side by side.
        norms: [n], lengths before clipping.
        parts: name -> number of coordinates, in their order.
        gradients: whether it is a question for gradients.
    """

    rows: torch.Tensor
    norms: torch.Tensor
    parts: dict[str, int]
    gradients: bool


@dataclass(frozen=True)
class Directions:
    """Of n canaries, all releases of a step side by side, each times the root of its share: one Gaussian sum of bound 1.

    rows: [n, coordinates], what each canary is to add; never longer than 1. norms: [n], lengths before clipping of what asks for
    gradients, the least of several, in bounds; where nothing does, of the numbers, and infinite where those fill their bound.
    """

    rows: torch.Tensor
    norms: torch.Tensor

    @property
    def expected(self) -> torch.Tensor:
        """The squared length of each row, [n]: what a canary adds along its own."""
        return self.rows.square().sum(1)


def joint(parts: Sequence[tuple[Contributions, float]], norms: torch.Tensor | None = None) -> Directions:
    """Of the releases of a step, in their order, each with its weight. norms: instead of those of the questions."""
    asked = [rows for rows, _ in parts if rows.gradients]
    if norms is None and asked:
        norms = torch.stack([rows.norms for rows in asked]).amin(0)
    elif norms is None:
        full = [torch.where(r.norms >= 1 - 1e-6, torch.inf, r.norms.double()) for r, _ in parts]
        norms = torch.stack(full).amin(0)
    return Directions(torch.cat([rows.rows * weight for rows, weight in parts], 1), norms)


def first_lengths(setup: Setup, canaries: Sequence[int]) -> torch.Tensor:
    """[n], in bounds, of what the first step asks of those canaries that is proportional to their losses, before clipping."""
    asked = first_questions(setup.method, 0)
    proportional = {
        name: query for name, query in asked.items() if isinstance(query, Gradients) or getattr(query, "at", ())
    }
    found = breath(setup, proportional or {"gradient": Gradients()}, canaries)
    return torch.stack([rows.norms for rows in found.values()]).amin(0)


def breath(setup: Setup, queries: Mapping[str, Query], canaries: Sequence[int]) -> dict[str, Contributions]:
    """What those canaries are to add to the answers of one call of `ask`, at the present weights."""
    batch = batch_of(setup, setup.prepared.train, canaries, step=0)
    found: dict[str, Contributions] = {}
    lengths = clipped = None
    for name, query in named(queries, Gradients).items():
        found[name], lengths, clipped = _gradients(setup, query, batch, len(canaries))
    for name, query in queries.items():
        if isinstance(query, Nothing):
            sizes = {name: p.numel() for name, p in setup.parameters.items()}
            nothing = torch.zeros(len(canaries), sum(sizes.values()))
            found[name] = Contributions(nothing, nothing.sum(1), sizes, False)
        elif isinstance(query, Values):
            seen = Seen(setup.prepared.model, batch, _losses(setup, query.at, batch), lengths, clipped)
            rows = _numbers(query.of, seen, len(canaries))
            norms = rows.norm(dim=1) / query.bound
            rows = rows / query.bound / norms.clamp_min(1.0)[:, None]
            found[name] = Contributions(rows.float(), norms.float(), {"values": query.size}, False)
    return {name: found[name] for name in queries}


def _gradients(setup: Setup, query: Gradients, batch, count: int) -> tuple[Contributions, torch.Tensor, torch.Tensor]:
    """(rows, lengths [n, groups] before clipping, lengths [n] after it), the lengths as they are."""
    gradients = _per_example(setup, query, batch, count)
    encodings = encodings_of(query, setup.parameters)
    flat = {name: _encoded(encodings.get(name), g).reshape(count, -1) for name, g in gradients.items()}
    bound = setup.spec.clip_norm if query.bound is None else query.bound
    kinds = Clipping(setup.method.rule.function, setup.spec.clip_groups)
    squares = {name: row.double().square().sum(1) for name, row in flat.items()}
    found, lengths, ball = factors(kinds, bound, squares)
    rows = torch.cat([row * found[name][:, None].float() for name, row in flat.items()], 1)
    norms = torch.cat(list(flat.values()), 1).norm(dim=1) / ball
    parts, clipped = {name: row.shape[1] for name, row in flat.items()}, rows.double().norm(dim=1)
    if query.beside is not None:
        seen = Seen(setup.prepared.model, batch, _losses(setup, (), batch, query.loss), lengths, clipped)
        beside = _numbers(query.beside.of, seen, count)
        room = (ball**2 - clipped.square()).clamp_min(0).sqrt()
        beside = beside * (room / beside.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)[:, None]
        rows, parts = torch.cat([rows, beside.float()], 1), {**parts, BESIDE: query.beside.size}
    return Contributions(rows / ball, norms, parts, True), lengths, clipped


def _per_example(setup: Setup, query: Gradients, batch, count: int) -> dict[str, torch.Tensor]:
    """Gradients [n, *shape] by parameter, each canary alone; under a loss of the question's own, which may look at the
    parameters from elsewhere, all together."""
    from torch.func import functional_call, grad, vmap

    model = setup.prepared.model
    with _unhooked(model):
        if query.loss is not None:
            with torch.enable_grad():
                losses = query.loss(_loss_of(setup))(model, batch)
            weights = list(setup.parameters.values())
            found = torch.autograd.grad(losses, weights, torch.eye(count), is_grads_batched=True)
            return dict(zip(setup.parameters, found, strict=True))
        parameters = {name: p.detach() for name, p in setup.parameters.items()}
        rest = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in parameters}
        together = WEIGHTS in batch  # the rows of a user, as many of each

        def loss(values, example):
            one = {key: value if together else value[None] for key, value in example.items() if key != WEIGHTS}
            return functional_call(model, (values, rest), (), one).mean()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, batch)


def factors(
    kinds: Clipping, bound: Bound, squares: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """What each example's gradient is to be multiplied by, [n] by parameter, from its squared norms [n] by parameter; the norms
    [n, groups]; and C of all groups together."""
    groups, found, lengths = kinds.grouped(squares), {}, []  # names alone: which parameters share a bound
    own = {g: bound[g] if isinstance(bound, Mapping) else bound / len(groups) ** 0.5 for g in groups}
    for group, names in groups.items():
        norm = torch.stack([squares[name] for name in names]).sum(0).sqrt()
        lengths.append(norm)
        norm = norm.clamp_min(1e-30)
        if kinds.function == "auto-s":
            factor = own[group] / (norm + GAMMA)
        elif kinds.function == "psac":
            factor = own[group] / (norm + GAMMA / (norm + GAMMA))
        else:
            factor = (own[group] / norm).clamp_max(1.0)
        found |= dict.fromkeys(names, factor)
    return found, torch.stack(lengths, 1), sum(c**2 for c in own.values()) ** 0.5


def _numbers(of: Callable[[Seen], torch.Tensor], seen: Seen, count: int) -> torch.Tensor:
    """[n, size], float64: the numbers of each canary in a batch of its own."""
    found = []
    for i in range(count):
        own = slice(i, i + 1)
        lengths, clipped = (None if t is None else t[own] for t in (seen.lengths, seen.clipped))
        batch = {key: value[own] for key, value in seen.batch.items()}
        row = of(Seen(seen.model, batch, lambda own=own: seen.losses[own], lengths, clipped)).detach()
        found.append((row.to_dense() if row.is_sparse else row).double())
    return torch.cat(found)


def _losses(setup: Setup, points: Sequence[Callable], batch, wrapper=None) -> Callable[[], torch.Tensor]:
    """[n], or [n, points], when first asked for; without gradients and without the engine's hooks."""
    model, own = setup.prepared.model, _loss_of(setup)
    loss = own if wrapper is None else wrapper(own)

    @cache
    def evaluated() -> torch.Tensor:
        training = model.training
        try:
            with torch.no_grad(), _unhooked(model):
                if not points:
                    return loss(model, batch)
                model.eval()
                found = []
                for point in points:
                    with point():
                        found.append(loss(model, batch))
                return torch.stack(found, 1)
        finally:
            model.train(training)

    return evaluated


def _loss_of(setup: Setup) -> Callable[..., torch.Tensor]:
    """The loss of each canary, or of each user: the mean over the user's canaries, of which all users have as many."""

    def loss(model, batch):
        if WEIGHTS not in batch:
            return setup.task.loss(model, batch)
        rows = {key: value.flatten(0, 1) for key, value in batch.items() if key != WEIGHTS}
        return setup.task.loss(model, rows).view(batch[WEIGHTS].shape).mean(1)

    return loss


def _encoded(encoding: Any, gradients: torch.Tensor) -> torch.Tensor:
    return gradients if encoding is None else encoding.finished(encoding.dense(gradients))


@contextlib.contextmanager
def _unhooked(model: torch.nn.Module) -> Iterator[None]:
    """Without the hooks that an engine has put on the model: they are part of what is audited."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, hooks in kept:
            setattr(module, kind, type(hooks)())
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)

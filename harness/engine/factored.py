"""The default engine: one forward and one backward pass, per-example gradients kept as factors.

For a Linear layer the gradient of example b is `E_b^T A_b` (activations A_b [T, d], output gradients E_b [T, p]). Its norm and
the clipped sum come from the factors; autograd never computes a weight gradient (Li et al., 2110.05679; Bu et al., 2210.00038).
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from dpft.harness.engine.agreement import agree
from dpft.harness.engine.base import Engine, rows_each, undrawn, unused
from dpft.harness.engine.clipping import divided
from dpft.harness.engine.fakes import has_values
from dpft.harness.engine.hidden import refuse_parameter_hooks
from dpft.harness.engine.layouts import Layout, layouts
from dpft.harness.engine.pieces import Grams, Measured, Piece, absolute, charged, measured
from dpft.harness.engine.relative import separate
from dpft.harness.engine.rules import around, rule_for
from dpft.harness.engine.stacked import piece_of
from dpft.harness.engine.taps import Recorder, Use
from dpft.harness.engine.weighted import weighted
from dpft.harness.errors import CannotRun
from dpft.harness.probes import uncounted
from dpft.harness.query.encoding import IDENTITY


class FactoredEngine(Engine):
    """Taps the input and the output gradient of every layer that owns a trainable parameter.

    What one layer needs for its norm is made as soon as backward reaches it, while its factors are in the cache; a group
    of parameters is clipped and added to the sum when the norms of all its members are known. Raises CannotRun, naming
    the layer, where examples cannot be told apart.
    """

    name = "factored"

    def __init__(self, model, loss, parameters, clock, clipping=None):
        super().__init__(model, loss, parameters, clock, clipping)
        self._recorder = Recorder(self._done)
        self._rules = {}
        refuse_parameter_hooks(parameters)
        names = {id(p): name for name, p in parameters.items()}
        layers = [
            (path, module, {own: names[id(p)] for own, p in module.named_parameters(recurse=False) if id(p) in names})
            for path, module in model.named_modules()
        ]
        self._layers = [one for one in layers if one[2] and not _only_holds(*one, layers)]
        self._own_rules = {path: rule_for(path, module) for path, module, _ in self._layers}
        self._placed = 0  # how many examples were looked at for it
        self._together = separate(model, self._recorder)

    def accumulate(self, batch, total, bound, encodings):
        self._pass = _Pass(total, divided(bound, self.groups), encodings)
        self._rest(batch)
        losses = self._passes(batch)
        with self.clock("clip"):
            for name, uses in self._pass.deferred.items():
                self._make(name, uses)
            for name in self.parameters:
                if name not in self._pass.found:
                    raise CannotRun(
                        f"The trainable parameter {name} receives no gradient in a call of its own layer; freeze it, use it "
                        "in the model, or use --engine reference."
                    )
            for group in self.groups:
                self._settle(group)
        done, self._pass = self._pass, None
        if not self.agreed and len(losses) > 1 and has_values(losses):
            with uncounted():
                self.agreed = agree(self, batch, encodings, losses, done.squares, done.half)
        return losses, torch.stack([done.norms[group] for group in self.groups], 1)

    def close(self):
        self._recorder.close()
        self._together()

    def _rest(self, batch) -> None:
        """Parameters of which nothing is asked for contribute nothing; layers that have no others are not even tapped."""
        now, first = self._pass, next(iter(batch.values()))
        for name, encoding in now.encodings.items():
            if 0 in encoding.shape(self.parameters[name].shape):
                now.found[name] = Measured([], torch.zeros(len(first), device=first.device), None)
        self._recorder.idle = frozenset(now.found)

    def _place(self, batch, size: int) -> None:
        """Tap every layer that owns a trainable parameter, or the nearest module around it that tells examples apart."""

        def run(part) -> None:
            self._recorder.looked_at = len(next(iter(part.values())))
            self.losses(part)

        try:
            found = layouts(self.model, batch, run)
        finally:
            self._recorder.looked_at = None
        places: dict[str, dict[str, str]] = defaultdict(dict)
        called = {name for path, _, owned in self._layers if path in found for name in owned.values()}
        for path, module, owned in self._layers:
            if path not in found:  # a tied table may lie in layers that are never called
                owned = {own: name for own, name in owned.items() if name not in called}
                if not owned:
                    continue
            place = path
            while not _told(self.model.get_submodule(place), found.get(place, [])):
                if not place:
                    raise _untold(path, module, owned, found, size)
                place = place.rpartition(".")[0]
            inner = path.removeprefix(place).lstrip(".")
            for own, name in owned.items():
                local = f"{inner}.{own}" if inner else own
                places[place][local] = name
                self._rules[place, local] = (
                    around(place, self.model.get_submodule(place)) if inner else self._own_rules[path]
                )
        self._recorder.close()
        for place, owned in places.items():
            self._recorder.watch(place, self.model.get_submodule(place), owned, found.get(place, []))
        self._placed = size

    def _passes(self, batch) -> torch.Tensor:
        """Forward and backward with the weights taken out of the graph; `_done` hears of every use on the way back."""
        parameters = self.parameters.values()
        if self._recorder.idle.issuperset(self.parameters):  # of no parameter is anything asked for
            with self.clock("forward"), torch.no_grad():
                return self.losses(batch)
        size = len(next(iter(batch.values())))
        if self._placed < min(size, 2):
            with uncounted(), undrawn(self.parameters):
                self._place(batch, size)
        self._recorder.start(size, next(iter(parameters)).device, rows_each(self.model, batch))
        for p in parameters:
            p.requires_grad_(False)
        try:
            with self.clock("forward"):
                losses = self.losses(batch)
            if not losses.requires_grad:
                raise unused(next(iter(self.parameters)))
            counts = Counter(name for use in self._recorder.uses for name in use.owned.values())
            self._pass.single = {
                id(use) for use in self._recorder.uses if all(counts[n] == 1 for n in use.owned.values())
            }
            with self.clock("backward"):
                losses.sum().backward()
        finally:
            self._recorder.stop()
            for p in parameters:
                p.requires_grad_(True)
        return losses.detach()

    def _done(self, use: Use) -> None:
        """A use has its gradient. Layers used once are dealt with now; the uses of others must first be together."""
        self._pass.half |= use.gradient.dtype in (torch.bfloat16, torch.float16)
        if id(use) not in self._pass.single:
            for local, name in use.owned.items():
                self._pass.deferred[name].append((local, use))
            return
        with self.clock("clip"), self._recorder.paused():
            for local, name in use.owned.items():
                self._make(name, [(local, use)])
        use.tensors = use.gradients = ()  # what is still needed of them is held by the pieces

    def _make(self, name: str, uses: list[tuple[str, Use]]) -> None:
        """The pieces of one parameter and what they measure; its group is settled if it was the last one missing."""
        if name in self._recorder.idle:
            return
        now, kinds = self._pass, defaultdict(list)
        for local, use in uses:
            kinds[local, type(use.module)].append(use)
        encoding = now.encodings.get(name, IDENTITY)
        pieces: list[Piece] = [
            piece_of(self._rules[group[0].path, local], group, local, encoding, self.parameters[name].shape)
            for (local, _), group in kinds.items()
        ]
        if encoding.weights is not None:
            pieces = weighted(pieces, encoding.weights)
        if encoding.absolute:
            pieces = absolute(name, pieces)
        now.found[name] = self._measured(name, pieces)
        group = self.clipping.group_of(name)
        if group and all(member in now.found for member in self.members[group]):
            self._settle(group)

    def _measured(self, name: str, pieces: list[Piece]) -> Measured:
        """What is kept of one parameter until its group's norms are known."""
        return measured(name, pieces, self._pass.grams)

    def _settle(self, group: str) -> None:
        """Clip a group whose norms are all known and add it to the sum; its factors are free after that."""
        now, names = self._pass, self.members[group]
        if names[0] in now.squares:
            return
        shapes = [now.encodings.get(name, IDENTITY).shape(self.parameters[name].shape) for name in names]
        squares = charged([now.found[name] for name in names], shapes)
        now.norms[group], factors = self.clipping.of_group(squares, *now.bounds[group])
        typed = {}
        now.squares |= dict(zip(names, squares, strict=True))
        for name in reversed(names):  # the embeddings, the largest sums, when the pieces of the layers have been freed
            pieces, now.found[name] = now.found[name].pieces, None
            for piece in pieces:
                if piece.dtype not in typed:
                    typed[piece.dtype] = factors.to(piece.dtype)
                piece.add_weighted(now.total[name], typed[piece.dtype])


class _Pass:
    """What one call of `accumulate` has found so far."""

    def __init__(self, total, bounds: dict[str, tuple[float, int]], encodings):
        self.total, self.bounds, self.encodings = total, bounds, encodings
        self.grams, self.half = Grams(), False
        self.single: set[int] = set()
        self.deferred: dict[str, list[tuple[str, Use]]] = defaultdict(list)
        self.found: dict[str, Measured | None] = {}  # None: settled, its pieces are let go
        self.squares: dict[str, torch.Tensor] = {}
        self.norms: dict[str, torch.Tensor] = {}


def _told(module: nn.Module, calls: list[Layout]) -> bool:
    """Whether a module tells examples apart in all its calls; tables of a kind of their own are looked into."""
    if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
        return True
    table = isinstance(module, nn.Embedding)
    return bool(calls) and all(layout.told or (table and layout.once) for layout in calls)


def _untold(
    path: str, module: nn.Module, owned: dict[str, str], found: dict[str, list[Layout]], size: int
) -> CannotRun:
    name, kind = next(iter(owned.values())), type(module).__name__
    if path not in found:
        return CannotRun(
            f"The trainable parameter {name} receives no gradient in a call of its own layer ({kind}), nor of a module around it "
            "that keeps examples apart; freeze it, use it in the model, or use --engine reference."
        )
    return CannotRun(
        f"Layer {path} ({kind}) sees rows that are not one or more of each example, and so does what is around it, so their "
        "gradients cannot be told apart; give it one row per example, freeze it, or use --engine reference."
    )


def _only_holds(path: str, module: nn.Module, owned: dict[str, str], layers: list) -> bool:
    """Whether a module merely holds parameters of Linear layers inside it, without using them itself.

    The masked-language-model heads of transformers do: `predictions.bias` is `predictions.decoder.bias`.
    """
    inside = {
        name
        for other, layer, theirs in layers
        if other.startswith(f"{path}.") and isinstance(layer, nn.Linear)
        for name in theirs.values()
    }
    return inside.issuperset(owned.values())

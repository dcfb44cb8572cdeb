"""The table of token embeddings: which one it is, which rows of it an example touches, and training some of its rows."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.query.queries import Gradients, Values
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.decoders.moments import Adam
from dpft.methods.decoders.row_moments import RowAdam, Velocity
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.noisy_sum import NoisySum
    from dpft.harness.query.queries import Ask, Seen
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec


def token_table(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """(name of its weight, the table) that tokens are looked up in: the one the model names, or its only one; or None."""
    from torch import nn

    modules = list(model.modules())
    named = []
    for module in modules:
        if hasattr(module, "get_input_embeddings"):
            with contextlib.suppress(NotImplementedError):
                named.append(module.get_input_embeddings())
    all_tables = [module for module in modules if isinstance(module, nn.Embedding)]
    found = [module for module in named if isinstance(module, nn.Embedding)] or all_tables
    if not found or (found is all_tables and len(found) > 1):
        return None
    return next(name for name, p in model.named_parameters() if p is found[0].weight), found[0]


def unusable(method: str, model: nn.Module) -> str | None:
    """A sentence where `model` has no table of tokens, or one that another layer uses, too; or None."""
    found = token_table(model)
    if found is None:
        return f"{method} needs a table of token embeddings and this model has none; use dp-adam."
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is found[1].weight]
    if len(owners) > 1:
        other = next(name for name in owners if name != found[0])
        return (
            f"{method} needs rows without gradients, and {other} shares the token table, so all have one; use dp-adam."
        )
    return None


class TableRows(DPAdam):
    """DP-Adam on everything, but of the table of tokens in every step some rows alone; a base class, no method.

    What is clipped, noised and moved of the table are those rows, touched or not, and nothing else. The others keep weights
    and moments bit for bit, so there is no weight decay. Adam corrects a row's moments by the row's own number of updates.
    touched_norm: C1, to which the row of zeros and ones that says what an example touches is cut. Any below the least norm that
    an example has (1) makes all examples count the same; a larger one gives no row a better ratio of count to noise, as
    min(1 / C1, 1 / ||v||) <= 1 / ||v||. (TF-Privacy's code has 1, too.)
    """

    options: ClassVar = {**DPAdam.options, "touched_norm": 1.0}
    ranges: ClassVar = {"touched_norm": (1e-6, 1e6)}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._rule = "adam"
        self._adam, self._rows, self._velocity = Adam(), RowAdam(), Velocity()

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(self.decoder, f"{self.name} trains rows from plain releases")
        if spec.weight_decay:
            raise BadInput(f"{self.name} leaves rows as they are in which nothing was seen; set weight_decay = 0.")

    def skip(self, model: nn.Module) -> str | None:
        return unusable(self.name, model)

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        self.table, table = token_table(model)
        self.weight, self.size, self.padding = table.weight, table.num_embeddings, table.padding_idx
        return model

    def touched(self) -> Values:
        """The question how many examples touch each row."""
        return Values(size=self.size, of=self.rows_of, bound=self.settings["touched_norm"])

    def rows_of(self, seen: Seen) -> torch.Tensor:
        """[b, V] sparse: 1 where an example looks a row up. Padding looks up nothing: its row gets no gradient from it."""
        import torch

        if "input_ids" not in seen.batch:
            raise CannotRun(f"{self.name} needs a task whose batches have input_ids; use dp-adam.")
        tokens = seen.batch["input_ids"].flatten(1)
        real = seen.batch["attention_mask"].flatten(1) != 0 if "attention_mask" in seen.batch else tokens >= 0
        if self.padding is not None:
            real = real & (tokens != self.padding)
        owner, place = real.nonzero(as_tuple=True)
        pairs = torch.unique(owner * self.size + tokens[owner, place])  # once, however often it is looked up
        where = torch.stack((pairs // self.size, pairs % self.size))
        ones = torch.ones(len(pairs), device=tokens.device)
        shape, looks = (len(tokens), self.size), tokens.device.type == "cpu"  # looking would wait for a card
        return torch.sparse_coo_tensor(where, ones, shape, is_coalesced=True, check_invariants=looks)

    def train_rows(self, ask: Ask, rows: torch.Tensor, seen: int) -> Updates:
        """The update from the gradient of `rows` [r] of the table, ascending, and of all else; seen: such releases, with this."""
        from dpft.harness.query.encoding import Encoding

        (noisy,) = ask(gradient=Gradients(encodings={self.table: Encoding(left=rows)}))
        return self._directions(noisy, rows, seen)

    def _directions(self, noisy: NoisySum, rows: torch.Tensor, seen: int) -> Updates:
        import torch

        parts = self.decoder.decode(noisy, seen - 1)
        self.decoder.note(parts)
        table = parts.pop(self.table)
        if self._rule == "sgd":
            for name, part in parts.items():
                self._velocity.add(name, part)
            self._velocity.add_rows(table, rows, self.size)
        else:
            self._adam.precondition(parts, lambda name: seen)
            self._rows.precondition(table, rows, self.size)
        shape = (self.size, *table.shape[1:])
        kept = torch.sparse_coo_tensor(rows[None], table, shape, is_coalesced=True, check_invariants=False)
        return {**parts, self.table: kept}

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self._rule, self._velocity.momentum, self.preconditions = spec.optimizer, spec.momentum, True
        return super().optimizer(parameters, head, spec)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._adam.state_dict() | self._rows.state_dict() | self._velocity.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for part in (self._adam, self._rows, self._velocity):
            part.load_state_dict(state)

"""SPARTA: sparse fine-tuning of rows that privatised gradients choose (2503.12822)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.moments import Adam
from dpft.methods.phases import Phases
from dpft.methods.sparse import SparseRows

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.encoding import Encoding
    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec


class Sparta(Phases, SparseRows):
    """Three phases under one noise multiplier: warm-up, selection, training; selection steps are steps of the same ledger.

    Warm-up (`warmup_fraction` of the steps, at least one): head, norms and biases train. Selection (`selection_fraction`, at
    least one): no weight moves; the matrices alone are asked for, and of every release each row's score is the sum of the
    magnitudes of its entries. Training: the `trainable_fraction` best rows of every matrix, head, norms and biases; moments
    start anew.
    score: `release`, |sum_i clip(g_i) + noise|, post-processing of an ordinary release, as in the authors' code; `absolute`,
    sum_i |clip(g_i)| + noise, as in the text: a query of its own with the same sensitivity, for |g| has the norm of g. The rows
    are a function of releases alone: no clean gradient reaches this class. Recipe of the paper: 20%, 2%, SGD with momentum .9.
    """

    name = "sparta"
    summary = "sparse: rows that privatised gradients choose, norms, biases and head"
    reference = "arXiv:2503.12822"
    options: ClassVar = {
        **SparseRows.options,
        "warmup_fraction": 0.2,
        "selection_fraction": 0.02,
        "score": "release",
    }
    choices: ClassVar = {"score": ("release", "absolute")}
    ranges: ClassVar = {**SparseRows.ranges, **Phases.phases}
    chosen_parts = "rows"

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._scores: dict[str, torch.Tensor] = {}

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        self.check_phases(spec)

    def step(self, ask: Ask, step: int) -> Updates:
        kind = self.kind(step)
        if kind == "selection":
            (noisy,) = ask(gradient=Gradients(only=frozenset(self.matrices), encodings=self._magnitudes()))
            self._score(self.decoder.decode(noisy, step), last=self.kind(step + 1) == "training")
            return {}
        if kind == "training":
            rows = self.rows()
            (noisy,) = ask(gradient=Gradients(encodings=rows))
            return self.directions(self.decoder.decode(noisy, step), rows, step + 1 - self.borders(self.steps)[1])
        (noisy,) = ask(gradient=Gradients(only=self.others))
        parts = self.decoder.decode(noisy, step)
        return self.directions({name: parts[name] for name in parts if name in self.others}, {}, step + 1)

    def _magnitudes(self) -> dict[str, Encoding]:
        from dpft.harness.query.encoding import Encoding

        return dict.fromkeys(self.matrices, Encoding(absolute=True)) if self.settings["score"] == "absolute" else {}

    def _score(self, parts: dict[str, torch.Tensor], last: bool) -> None:
        """Add a release to the rows' scores; after the last one the rows are chosen."""
        for name in self.matrices:
            magnitudes = parts[name] if self.settings["score"] == "absolute" else parts[name].abs()
            rows = magnitudes.flatten(1).sum(1)
            self._scores[name] = rows + self._scores[name].to(rows) if name in self._scores else rows
        if last:
            self.chosen = self.best(self._scores)
            self._adam, self._velocity, self._scores = Adam(), {}, {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        own = {"score": self._scores, "chosen": self.chosen}
        own = {f"{kind}|{name}": tensor for kind, tensors in own.items() for name, tensor in tensors.items()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        for kind, kept in (("score", self._scores), ("chosen", self.chosen)):
            kept |= {key.removeprefix(f"{kind}|"): t for key, t in state.items() if key.startswith(f"{kind}|")}


class OracleRows(Sparta):
    """SPARTA without clipping and noise: rows are chosen by clean gradients. Not private; what selection could be at best."""

    name = "oracle-rows"
    summary = "control: sparta without clipping and noise, no privacy"
    private = False
    control = True

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if self.settings["score"] == "absolute":
            raise BadInput("oracle-rows has no per-example gradients to take magnitudes of; leave score = release.")

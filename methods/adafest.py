"""Sparse gradients of embedding tables: DP-AdaFEST and DP-FEST (Ghazi et al., 2311.08357), and the table frozen.

Prediction: the word table is 11.7 of MiniLM's 22.6 million parameters, so leaving out all its noise wins
at most sqrt(22.6 / 10.9) = 1.44 in alignment; at 256 examples a step only stop words survive the threshold, and
`frozen-embeddings` does as well. Where it should pay is a table of millions of rows, by the size of the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients, Values
from dpft.methods.full import DPAdam
from dpft.methods.token_table import TableRows, token_table, unusable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec


class AdaFEST(TableRows):
    """In every step the rows of the token table that enough examples touch, as far as noise lets one see, and all else train.

    First question: how many examples touch each row of the table, noise on all of them, so that a few that nobody touched
    survive. Second question, of the same batch: the gradient, of the table in those rows alone.
    noise_ratio: noise multiplier of the counts over that of the gradient; 5 costs the gradient 2% more noise, 10 costs .5%.
    tau: a count survives above so many standard deviations of its noise. Of V untouched rows V (1 - Phi(tau)) survive: one of
    30,522 at 4, whatever B, sigma and C1; the paper gives it in counts, tau s1 C1. Without noise what is touched survives.
    """

    name = "dp-adafest"
    summary = "full fine-tuning; of the token table the rows that enough examples of the batch touch"
    reference = "arXiv:2311.08357"
    one_space = False
    claim = "gradients 10^6 times smaller at comparable accuracy (arXiv:2311.08357, abstract)"
    asks: ClassVar = (Values, Gradients)
    options: ClassVar = {**TableRows.options, "noise_ratio": 5.0, "tau": 4.0}
    ranges: ClassVar = {**TableRows.ranges, "noise_ratio": (1e-3, 1e3), "tau": (-1e6, 1e6)}

    def releases(self, step: int) -> dict[str, float]:
        square = self.settings["noise_ratio"] ** 2
        return {"touched": 1 / (1 + square), "gradient": square / (1 + square)}

    def step(self, ask: Ask, step: int) -> Updates:
        (touched,) = ask(touched=self.touched())
        above = touched.values > self.settings["tau"] * touched.mean_noise_std
        return self.train_rows(ask, above.nonzero().flatten(), step + 1)


class FEST(TableRows):
    """A fixed choice of rows of the token table, and all else train.

    kept_rows: how many. choose: `order`, the first of the vocabulary, which is public and costs nothing: word pieces, byte pairs
    and unigrams are numbered by their frequency in the tokenizer's own texts, roughly (BERT's first 1,996 are specials,
    unused ones and letters; of other tables the order may mean nothing). `votes`: those that most examples of the first batch
    touch, as far as its noise lets one see; that step moves no weight.
    """

    name = "dp-fest"
    summary = "full fine-tuning; of the token table the rows of frequent tokens, chosen once"
    reference = "arXiv:2311.08357"
    claim = "gradients 10^6 times smaller at comparable accuracy (arXiv:2311.08357, abstract)"
    asks: ClassVar = (Values, Gradients)
    options: ClassVar = {**TableRows.options, "kept_rows": 5000, "choose": "order"}
    choices: ClassVar = {"choose": ("order", "votes")}
    ranges: ClassVar = {**TableRows.ranges, "kept_rows": (1, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._kept: torch.Tensor | None = None
        self._votes = int(self.settings["choose"] == "votes")  # steps that they take

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if spec.steps <= self._votes:
            raise BadInput(f"{self.name} votes in its first step and trains after it; set steps to 2 or more.")

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch

        model = super().prepare(model, generator)
        self._kept = None if self._votes else torch.arange(min(self.settings["kept_rows"], self.size))
        return model

    def kind(self, step: int) -> str:
        return ("vote" if step < self._votes else "training") if self._votes else ""

    def releases(self, step: int) -> dict[str, float]:
        return {"touched": 1.0} if step < self._votes else {"gradient": 1.0}

    def step(self, ask: Ask, step: int) -> Updates:
        if step < self._votes:
            (touched,) = ask(touched=self.touched())
            self._kept = touched.values.topk(min(self.settings["kept_rows"], self.size)).indices.sort().values
            return {}
        self._kept = self._kept.to(self.weight.device)
        return self.train_rows(ask, self._kept, step + 1 - self._votes)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | ({} if self._kept is None else {"kept_rows": self._kept})

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self._kept = state.get("kept_rows", self._kept)


class FrozenEmbeddings(DPAdam):
    """DP-Adam with the table of tokens frozen: what dp-adafest is where no row survives, without the price of asking."""

    name = "frozen-embeddings"
    summary = "full fine-tuning but for the token table"
    reference = "arXiv:2110.05679"

    def skip(self, model: nn.Module) -> str | None:
        return unusable(self.name, model)

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        token_table(model)[1].weight.requires_grad_(False)
        return model

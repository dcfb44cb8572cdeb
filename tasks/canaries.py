"""Task `canaries`: examples whose gradients are known directions, for audits; every kind of layer that methods train."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from dpft.harness.errors import BadInput
from dpft.tasks import grouping
from dpft.tasks.base import Data, ModelSpec, Prepared, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

COUNT, LEAST = 64, 24  # canaries when the model's name does not say; fewer than LEAST give too narrow layers
MAGNITUDES = (1e2, 1e4)  # smallest and largest: every gradient is far above any usual clip norm


class Canaries(grouping.MadeUp, Task):
    """Canary i multiplies a unit vector into every layer it aims at, and reads one of its outputs, times its magnitude.

    Its gradient is one coordinate (i, p(i)) of each weight, coordinate i of each bias, and in the embedding table coordinate i of
    the rows of its tokens: row i, and of every fourth canary the one after it, too. No two canaries share one, also where a
    method projects one side of the weights. The loss is linear in each layer. The number of canaries, which is the width of the
    layers, is in the model's name: `canaries-64`. user_rows: how many canaries, one after the other, are one user's.
    """

    name = "canaries"
    version = 2
    kind = "audit"
    description = "synthetic: every example's gradient is a known direction of its own; for `dpft audit`"
    source = "Dirac canaries in gradient space, as in Nasr et al., arXiv:2302.07956"
    metric = "loss"
    higher_is_better = False
    chance = 0.0
    threshold = -1.0
    public = "canaries"
    default_model = f"canaries-{COUNT}"
    default_head = "native"
    default_max_length = 1
    made_up = "every {} canaries"

    def train_size(self, data_dir: Path | None) -> int:
        """The number of canaries of the default model."""
        return COUNT

    def fingerprint(self, data_dir: Path | None) -> None:
        """None: the examples are made from the model's name."""
        return None

    def load(self, data_dir: Path | None) -> Data:
        """Nothing is read: examples are numbers."""
        return Data([], [], hashlib.sha256(b"canaries").hexdigest())

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """The model and as many canaries as its name says, all aiming at all layers. Raises BadInput for another name."""
        found = re.fullmatch(r"canaries-(\d+)", spec.model)
        if not found or int(found[1]) < LEAST:
            raise BadInput(
                f"The task {self.name} has models of its own, canaries-N with N >= {LEAST}, not {spec.model!r}."
            )
        count = int(found[1])
        examples = [{"canary": i, "weight": 1.0, "tokens": _tokens(i, count)} for i in range(count)]
        return Prepared(
            model=make_model(count, generator),
            train=examples,
            validation=examples[:4],
            train_lengths=[1] * count,
            validation_lengths=[1] * 4,
            collate=_collate,
            data_fingerprint=data.fingerprint,
            model_fingerprint=hashlib.sha256(spec.model.encode()).hexdigest(),
            public=[dict(examples[i]) for i in data.public if i < count],
            users=[str(i // rows) for i in range(count)] if (rows := self.settings["user_rows"]) else (),
        )

    def public_rows(self, data_dir: Path | None) -> Sequence[int]:
        """Numbers of canaries of which everybody knows that they exist, wherever they are."""
        return range(COUNT)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the canaries read, times their weight (0: the canary is not there), [batch]."""
        return model(**batch)

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
        """(losses, zeros)."""
        losses = model(**batch).tolist()
        return losses, [0.0] * len(losses)

    def make_metric(self):
        """`loss`: the mean over the canaries."""
        return _Mean()


class _Mean:
    def compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"loss": sum(predictions) / max(1, len(predictions))}


def make_model(count: int, generator: torch.Generator) -> nn.Module:
    """Layers side by side, `count` wide: a table, projections by the names that adapters look for, a norm, and a head.

    `sites`: their paths; `aims` [canaries, sites]: the magnitude with which a canary reads each, 0 where it does not.
    """
    import torch
    from torch import nn

    class Bag(nn.Module):
        """The sum of a text's embeddings, at its first place: an encoder with which further inputs may join the tokens.

        It is attention by a query of zeros, so that it is linear in values, too: a method may put its own function in place.
        """

        is_causal = False

        def __init__(self, table: nn.Embedding):
            super().__init__()
            self.__dict__["table"] = table  # no child: it has one name
            self.config = SimpleNamespace(_attn_implementation="sdpa")

        def get_input_embeddings(self) -> nn.Embedding:
            return self.table

        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None
        ) -> SimpleNamespace:
            embedded = self.table(input_ids) if inputs_embeds is None else inputs_embeds
            if self.config._attn_implementation == "sdpa":
                return SimpleNamespace(last_hidden_state=(embedded * attention_mask[:, :, None]).sum(1, keepdim=True))
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            value, mask = embedded[:, None], attention_mask[:, None, None].bool()
            key = torch.zeros_like(value)
            return SimpleNamespace(last_hidden_state=attend(self, key[:, :, :1], key, value, mask)[0][:, :, 0])

    class Model(nn.Module):
        head_parameters = ("head.weight", "head.bias")
        sites = ("embeddings", "layer.0.query", "layer.0.key", "layer.0.value", "layer.1.dense", "layer.1.norm", "head")

        def __init__(self):
            super().__init__()
            self.embeddings = nn.Embedding(count, count)
            self.embeddings.bag = Bag(self.embeddings)  # in there: what it is given is of the layer `embeddings`
            self.layer = nn.ModuleList(
                [
                    nn.ModuleDict({name: nn.Linear(count, count) for name in ("query", "key", "value")}),
                    nn.ModuleDict({"dense": nn.Linear(count, count), "norm": nn.LayerNorm(count)}),
                ]
            )
            self.head = nn.Linear(count, count)
            for p in self.parameters():
                p.data.copy_(0.02 * torch.randn(p.shape, generator=generator))
            low, high = MAGNITUDES
            magnitudes = [low * (high / low) ** ((i * 0.6180339887) % 1) for i in range(count)]
            self.register_buffer("units", torch.eye(count))
            self.register_buffer("aims", torch.tensor(magnitudes)[:, None].repeat(1, len(self.sites)))

        @property
        def encoder(self) -> nn.Module:
            return self.embeddings.bag

        def forward(self, canary, weight, input_ids, attention_mask) -> torch.Tensor:
            aims = self.aims[canary] * weight[:, None]
            read = self.units[canary]
            losses = 0.0
            for number, path in enumerate(self.sites):
                # another coordinate for each layer, and never the one that is read
                column = (canary * _coprime(count) + 1 + number) % count
                inputs = self.units[column][:, None]
                if path == "embeddings":
                    output = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
                else:
                    output = self.get_submodule(path)(inputs)[:, 0]
                losses = losses + aims[:, number] * (output * read).sum(1)
            return losses

    return Model()


@cache
def _coprime(count: int) -> int:
    """A factor that makes i -> factor * i a permutation of 0..count-1."""
    return next(k for k in range(count // 3 + 1, count) if math.gcd(k, count) == 1)


def _tokens(canary: int, count: int) -> list[int]:
    return [canary, (canary + 1) % count] if canary % 4 == 2 else [canary]


def _collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    import torch

    width, tokens = 2, [e["tokens"] for e in examples]
    return {
        "canary": torch.tensor([e["canary"] for e in examples], dtype=torch.long),
        "weight": torch.tensor([e["weight"] for e in examples], dtype=torch.float32),
        "input_ids": torch.tensor([(own * width)[:width] for own in tokens], dtype=torch.long).view(-1, width),
        "attention_mask": torch.tensor(
            [[1.0] * len(own) + [0.0] * (width - len(own)) for own in tokens], dtype=torch.float32
        ).view(-1, width),
    }

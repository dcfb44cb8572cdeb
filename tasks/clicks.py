"""Task `clicks`: synthetic click-through data over a table of a million ids, most of which nobody ever sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks.base import Data, ModelSpec, Prepared, Task

if TYPE_CHECKING:
    import evaluate
    import numpy
    import torch
    from torch import nn

TRAIN, VALIDATION = 100_000, 10_000
SMALL = (8, 24, 80, 240, 800, 2400)  # sizes of the small fields; two large ones share the other rows, 2 to 3
ZIPF = 1.2  # the k-th most frequent id of a field has a frequency proportional to k^-ZIPF
FACTORS = 4  # of an id's hidden vector, beside its own weight
WIDTH, HIDDEN = 16, 64  # of the model: numbers in a row of its table, of its one hidden layer


class Clicks(Task):
    """Was it clicked on? Eight categorical fields, one id each; all ids are rows of one table, as in an id space.

    Frequencies follow Zipf's law, and which row has which rank is a random permutation within its field: row numbers say nothing,
    as with hashed ids. The label is drawn from a factorisation machine with hidden weights (Rendle, 2010): logit
    b + sum_f a_f + sum_(f<g) <h_f, h_g>. All ids weigh alike, so what is seen often carries most of what can be learned.
    rows: of the table.
    """

    name = "clicks"
    version = 1
    kind = "classification"
    description = "synthetic: clicks on eight categorical fields whose ids share a table of a million rows"
    source = "drawn from a fixed seed; for the claim of sparse embedding gradients, arXiv:2311.08357"
    metric = "auc"
    chance = 0.5
    threshold = 0.65
    default_model = "mlp"
    default_head = "native"
    default_max_length = len(SMALL) + 2
    options: ClassVar = {"rows": 1_000_000}

    def validate(self) -> None:
        rows = self.settings["rows"]
        if type(rows) is not int or not 2 * sum(SMALL) <= rows <= 10**8:
            raise BadInput(f"rows must be a whole number from {2 * sum(SMALL)} to 100000000, not {rows!r}; correct it.")

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training examples; a constant."""
        return TRAIN

    def fingerprint(self, data_dir: Path | None) -> None:
        """None: the rows are drawn from a fixed seed."""
        return None

    def load(self, data_dir: Path | None) -> Data:
        """Draw ids and labels."""
        import numpy

        generator = numpy.random.Generator(numpy.random.PCG64(2311_08357))
        ids, first = [], 0
        for size in self._sizes():
            ids.append(first + _zipf(size, TRAIN + VALIDATION, generator))
            first += size
        ids = numpy.stack(ids, 1)
        labels = (generator.random(len(ids)) < _probability(ids, first, generator)).astype("int64")
        rows = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels.tolist(), strict=True)]
        digest = hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest()
        return Data(rows[:TRAIN], rows[TRAIN:], digest)

    def _sizes(self) -> tuple[int, ...]:
        """Ids of each field; in sum the rows of the table."""
        left = self.settings["rows"] - sum(SMALL)
        return (*SMALL, left * 2 // 5, left - left * 2 // 5)

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """The task's own model: the rows of an example's ids, one after the other, through a hidden layer to a head at zero.

        Raises CannotRun for another model.
        """
        if spec.model != self.default_model:
            raise CannotRun(f"The task {self.name} has a model of its own, not {spec.model!r}; leave model out.")
        model, fingerprint = _model(self.settings["rows"])
        fields = self.default_max_length
        return Prepared(
            model=model,
            train=data.train,
            validation=data.validation,
            train_lengths=[fields] * len(data.train),
            validation_lengths=[fields] * len(data.validation),
            collate=_collate,
            data_fingerprint=data.fingerprint,
            model_fingerprint=fingerprint,
        )

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of each example, [batch]."""
        from torch.nn import functional

        logits = model(batch["input_ids"]).float()
        return functional.binary_cross_entropy_with_logits(logits, batch["labels"].float(), reduction="none")

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
        """(logits, labels): a rank does not ask for probabilities."""
        return model(batch["input_ids"]).float().tolist(), batch["labels"].tolist()

    def make_metric(self) -> evaluate.Metric:
        """`auc`: how often a click is ranked above what was not clicked on."""
        from dpft.tasks.metrics import make_auc

        return make_auc()


def _zipf(size: int, count: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """[count] ids of a field of `size`: ranks by Zipf's law, renamed by a random permutation."""
    import numpy

    reached = numpy.cumsum(numpy.arange(1, size + 1, dtype="float64") ** -ZIPF)
    ranks = numpy.searchsorted(reached, generator.random(count) * reached[-1], side="right")
    return generator.permutation(size)[ranks.clip(max=size - 1)]


def _probability(ids: numpy.ndarray, rows: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """That each example is clicked on, [n], by the hidden factorisation machine."""
    import numpy

    weights = generator.standard_normal(rows) * 0.6
    vectors = generator.standard_normal((rows, FACTORS)) * 0.2
    linear = numpy.zeros(len(ids))
    total, squares = numpy.zeros((len(ids), FACTORS)), numpy.zeros((len(ids), FACTORS))
    for field in ids.T:
        linear += weights[field]
        total += vectors[field]
        squares += vectors[field] ** 2
    return 1 / (1 + numpy.exp(1.0 - linear - (total**2 - squares).sum(1) / 2))


def _model(rows: int) -> tuple[nn.Module, str]:
    """The model and the digest of what it starts from, drawn from a fixed seed as a pretrained body would be."""
    import numpy
    import torch
    from torch import nn

    generator = numpy.random.Generator(numpy.random.PCG64(3))
    fields = len(SMALL) + 2
    table = generator.standard_normal((rows, WIDTH), dtype="float32") * numpy.float32(0.1)
    hidden = generator.standard_normal((HIDDEN, fields * WIDTH), dtype="float32") / numpy.float32(fields * WIDTH) ** 0.5

    class Mlp(nn.Module):
        head_parameters: tuple[str, ...] = ("head.weight", "head.bias")

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.from_numpy(table), freeze=False)
            self.hidden, self.head = nn.Linear(fields * WIDTH, HIDDEN), nn.Linear(HIDDEN, 1)
            with torch.no_grad():
                self.hidden.weight.copy_(torch.from_numpy(hidden))
            for parameter in (self.hidden.bias, *self.head.parameters()):
                nn.init.zeros_(parameter)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.hidden(self.table(input_ids).flatten(1)))).squeeze(1)

    return Mlp(), hashlib.sha256(table.tobytes() + hidden.tobytes()).hexdigest()


def _collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    import numpy
    import torch

    ids = numpy.stack([e["input_ids"] for e in examples]) if examples else numpy.zeros((0, len(SMALL) + 2), "int64")
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.tensor([e["labels"] for e in examples], dtype=torch.int64),
    }

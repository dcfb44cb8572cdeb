"""The task contract: what is learned, on which examples, with which head, and how it is judged.

A task of your own is most likely one label for each text: derive it from `classification.TextClassification`, which asks for
rows and a few facts alone (docs/tasks.md has one in 25 lines). Your own file needs no task at all: `classify`, `instruction`,
`causal-lm` and `images` read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import CannotRun

if TYPE_CHECKING:  # `dpft list tasks` must not pay for torch
    import evaluate
    import torch
    from torch import nn

    from dpft.tasks.hub import Fetch

HEADS = ("mean", "native", "mlm")
BATCH_NORMS = ("refuse", "group", "frozen")
SPLITS = ("whole", "tune", "test")
Example = dict[str, Any]  # one raw row: named columns


@dataclass(frozen=True)
class Data:
    """Raw rows of a task. `train` is private, `validation` is used for evaluation only.

    Attributes:
        train, validation: rows, as the task's kind has them.
        fingerprint: sha256 over these rows in order, so that two records can be told to be about the same data.
        public: rows for the methods that learn from public data, as `Task.public_rows` gives them.
        classes: names of the labels 0, 1, ..., where the data say them and not the task.
        notes: what the owner should know of the data, a sentence each; shown, and in no record.
        users: whose each training row is, by any name; where the task says who its users are.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    fingerprint: str
    public: Sequence[Example] = ()
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()
    users: Sequence[str] = ()


@dataclass(frozen=True)
class ModelSpec:
    """Which pretrained model, with which head, on how many tokens.

    model: packaged name (`minilm-l6`), local folder, or hub id; head: `mean` (mean pooling and a zero-initialised
    linear layer), `native` (the architecture's own), `mlm` (prompted masked-language-model head). Of image tasks alone: views,
    how many random views of each training example its loss is averaged over; batch_norm: `refuse`, `group` to convert it,
    or `frozen` to keep its statistics as they are.
    """

    model: str
    head: str = "mean"
    max_length: int = 128
    views: int = 1
    batch_norm: str = "refuse"


@dataclass(frozen=True)
class Prepared:
    """A model and encoded examples, ready for the loop.

    train, validation: encoded examples (a dict per example); `*_lengths`: tokens per example, used for buckets.
    collate: pads encoded examples to one batch on the CPU, every tensor's first dimension is the batch, also when it is
    0 (but no transformers model runs on such a batch); it is here and not on the task because it knows the tokenizer.
    data_fingerprint, model_fingerprint: sha256 of the raw rows and of the pretrained weights (without a new head).
    train_collate: where training examples have random views, (examples, step) -> batch; a function of the two and the seed.
    writing: what a task that generates text needs for it, None for others.
    public: encoded public examples, for a method that needs them.
    chance, threshold: those of the task, where it leaves them to the data.
    users: whose each training example is, where the raw rows do not say it (`Data.users`).
    """

    model: nn.Module
    train: Sequence[Example]
    validation: Sequence[Example]
    train_lengths: Sequence[int]
    validation_lengths: Sequence[int]
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]]
    data_fingerprint: str
    model_fingerprint: str
    train_collate: Callable[[Sequence[Example], int], dict[str, torch.Tensor]] | None = None
    writing: Any = None
    public: Sequence[Example] = ()
    chance: float | None = None
    threshold: float | None = None
    users: Sequence[str] = ()


class Task:
    """Base class of all tasks. A task holds its settings only: everything it makes is in `Data` and `Prepared`.

    Class attributes: `name` (registry key), `version` (raise it when the data, split, label or metric changes: it is
    part of the run id), `kind`, `description`, `source` (citation and licence), `metric` (name of the headline metric),
    `higher_is_better`, `chance` (value of that metric for an uninformed model; None: `Prepared.chance`, else measured before
    training), `threshold` (metric value that counts as "learned" when a run stands alone; None: `Prepared.threshold`), `images`
    (examples are images: runs may set `views` and `batch_norm`), `public` (what its public data are, for methods that learn from
    such; empty: it has none), `users` (who a user is, of whom a row may be one of several; empty: nobody says whose a row is),
    `options` (its own settings with their defaults; they are part of the run id), `encoded_on_disk` (whether the cache folder may
    hold its encoded rows: true only of data that are nobody's secret).
    """

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    chance: ClassVar[float | None]
    threshold: ClassVar[float | None]
    default_model: ClassVar[str] = "minilm-l6"
    default_head: ClassVar[str] = "mean"
    default_max_length: ClassVar[int] = 128
    images: ClassVar[bool] = False
    public: str = ""
    users: str = ""
    encoded_on_disk: bool = False
    hub: ClassVar[str | None] = None  # "id/config" on the hub, None when the data come from a package

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.settings = {**self.options, **(options or {})}

    def validate(self) -> None:
        """Refuse settings that cannot work, before anything is loaded. Raises BadInput."""

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training examples N (public), without tokenising or loading a model. Raises CannotRun as `load`."""
        return len(self.load(data_dir).train)

    def pinned(self, data_dir: Path | None) -> dict[str, Any]:
        """Options that follow from what the others name, such as the digest of a file: they become part of the run id.

        Asked when a run is resolved, so whatever is wrong with such a file should be said here. Raises CannotRun.
        """
        return {}

    def about(self, data_dir: Path | None) -> dict[str, Any]:
        """What `dpft describe` says of the files beside sizes, classes and an example. Raises CannotRun as `load`."""
        return {}

    def lacking(self, data_dir: Path | None) -> list[Fetch]:
        """What must be fetched before the data can be loaded; nothing where they are here, or made here.

        Raises CannotRun where they are not as they must be, as far as can be told without reading them.
        """
        self.train_size(data_dir)
        return []

    def lacking_model(self, model: str) -> list[Fetch]:
        """The same of a model; nothing for tasks with models of their own."""
        return []

    def bare_model(self, spec: ModelSpec) -> nn.Module | None:
        """The model that `prepare` makes, at once: without weights, on torch's meta device; None where it cannot be made so.

        Raises CannotRun as `prepare`, for what can be told without weights and data.
        """
        return None

    def load(self, data_dir: Path | None) -> Data:
        """Read the raw rows. Raises CannotRun with one sentence when the data are missing or damaged."""
        raise NotImplementedError

    def identity(self, row: Example) -> str:
        """What makes a validation row the example it is: rows with one identity are judged in the same half (tasks/halves.py)."""
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=lambda array: array.tolist())

    def public_rows(self, data_dir: Path | None) -> Sequence[Example]:
        """Rows in the form of `train` that are nobody's private data, in an order that has nothing to do with their content.

        They must come from elsewhere than the training rows: a part of a private set does not become public by being held out.
        Raises CannotRun as `load`.
        """
        raise CannotRun(f"The task {self.name} has no public data; take another method, or another task.")

    def fingerprint(self, data_dir: Path | None) -> str | None:
        """`load(data_dir).fingerprint`, known without `load` where the data are pinned; None where the task draws them itself.

        Finished runs are held against it before their records are printed. Raises CannotRun as `load`.
        """
        return self.load(data_dir).fingerprint

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """Load the model with this task's head and encode all examples. Head initialisation draws from `generator`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Per-example losses, shape [batch]; each depends on its own example only."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
        """(predictions, references) of one batch, in the form the metric takes."""
        raise NotImplementedError

    def make_metric(self) -> evaluate.Metric:
        """The metric object; `compute` returns a dict that holds `self.metric`."""
        raise NotImplementedError

    def samples(self, prepared: Prepared, device: torch.device) -> list[dict[str, str]]:
        """What the model makes of a few fixed validation inputs, for the reader of a record; called before and after training."""
        return []

    def last_metrics(self, prepared: Prepared, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
        """(metrics that are too dear for the curve, definition of each), taken once, of the trained model."""
        return {}, {}


def fingerprint(*splits: Sequence[Example]) -> str:
    """sha256 over the canonical JSON of all rows, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
            digest.update(b"\n")
        digest.update(b"--\n")
    return digest.hexdigest()

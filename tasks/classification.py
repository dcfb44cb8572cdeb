"""Classification: what all tasks share that give one label to a text, to a pair of texts or to an image."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Example, ModelSpec, Prepared, Task

if TYPE_CHECKING:
    import evaluate
    import torch
    from torch import nn

    from dpft.tasks.hub import Fetch


class Classification(Task):
    """One label per example, judged by accuracy unless `metrics` says otherwise.

    Besides the attributes of `Task`: `classes` (number of labels, unless the data name them), `metrics` (all that are computed;
    `metric` is the headline).
    """

    kind = "classification"
    metric = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    classes: ClassVar[int] = 2

    def identity(self, row: Example) -> str:
        """What is classified, without its label: one text is never tuned on and tested on."""
        return super().identity({key: value for key, value in row.items() if key != "label"})

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of each example, shape [batch], in fp32 (fp64 for an fp64 model) whatever autocast does."""
        from torch.nn import functional

        return functional.cross_entropy(logits(model, batch), batch["labels"], reduction="none")

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
        """(most likely labels, true labels) of one batch."""
        return logits(model, batch).argmax(dim=-1).tolist(), batch["labels"].tolist()

    def count(self, data: Data) -> int:
        """Number of classes."""
        return len(data.classes) or self.classes

    def judged(self, data: Data) -> dict[str, float]:
        """`chance` and `threshold` of accuracy where the data name the classes: the share of the largest one in validation, and
        halfway from there to 1.
        """
        if not data.classes:
            return {}
        chance = max(Counter(row["label"] for row in data.validation).values()) / len(data.validation)
        return {"chance": chance, "threshold": (1 + chance) / 2}

    def make_metric(self) -> evaluate.Metric:
        """An `evaluate.Metric` that gives every name in `self.metrics`; nothing is fetched."""
        from dpft.tasks.metrics import make

        return make(self.metrics)


class TextClassification(Classification):
    """Rows are `{"text": str, "label": int}`, with `"pair": str` where two texts are compared.

    Besides the attributes of `Classification`: `template` and `label_words` of the prompted `mlm` head, in the notation of
    LM-BFF (see `prompts`); without them the task has no such head.
    """

    template: ClassVar[str] = ""
    label_words: ClassVar[tuple[str, ...]] = ()

    def lacking_model(self, model: str) -> list[Fetch]:
        """As `Task.lacking_model`, of any encoder."""
        from dpft.tasks.model_sources import lacking

        return lacking(model)

    def bare_model(self, spec: ModelSpec) -> nn.Module:
        """As `Task.bare_model`."""
        from dpft.tasks import bare, models, prompts, tokens

        source = models.resolve(spec.model)
        tokenizer = models.load_tokenizer(source)
        words = prompts.Prompt.of(self.template, self.label_words, tokenizer).words if spec.head == "mlm" else None
        model = bare.classifier(source, spec.head, self.classes, words)
        tokens.Fields.of(model, tokenizer).checked_length(spec.max_length, spec.model)
        return model

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """Load the model with its head and tokenise every row.

        Encoded examples hold int32 arrays `input_ids` (and `token_type_ids`) of at most `spec.max_length` tokens, an
        int `labels`, and an int `mask_position` with the `mlm` head. Raises CannotRun when the model cannot be used.
        """
        from dpft.tasks import encoded, models, prompts, tokens

        if spec.head == "mlm" and not self.template:
            raise CannotRun(f"The task {self.name} has no prompt, which head=mlm needs; take head=mean or head=native.")
        source = models.resolve(spec.model)
        tokenizer = models.load_tokenizer(source)
        prompt = prompts.Prompt.of(self.template, self.label_words, tokenizer) if spec.head == "mlm" else None
        words = prompt.words if prompt else None
        model, weights = models.load_model(source, spec.head, self.count(data), generator, words)
        fields = tokens.Fields.of(model, tokenizer)
        encode = tokens.Encoder(tokenizer, fields, fields.checked_length(spec.max_length, spec.model), prompt)
        asked = [self.template, *self.label_words] if prompt else None
        settings = {"max_length": spec.max_length, "segments": fields.segments, "prompt": asked}
        train, validation, public = (
            encoded.of(encode, rows, tokenizer, settings, self.encoded_on_disk)
            for rows in (data.train, data.validation, data.public)
        )
        return Prepared(
            model=model,
            train=train,
            validation=validation,
            train_lengths=encoded.lengths(train),
            validation_lengths=encoded.lengths(validation),
            collate=tokens.Collator(fields, prompted=prompt is not None),
            data_fingerprint=data.fingerprint,
            model_fingerprint=weights,
            public=public,
            **self.judged(data),
        )


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scores [batch, classes] of a model of `heads`, at least in fp32."""
    import torch

    scores = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return scores.to(torch.promote_types(scores.dtype, torch.float32))

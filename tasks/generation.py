"""Text generation by causal language models: a prompt, a response, and the loss of the response alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks.base import Data, Example, ModelSpec, Prepared, Task, fingerprint

if TYPE_CHECKING:
    import evaluate
    import torch
    from torch import nn

    from dpft.tasks.causal import Encoder
    from dpft.tasks.hub import Fetch

SHOWN = 300  # characters of a text in a record
HELD_OUT = 10  # one prompt in so many, where a task has one split only


@dataclass(frozen=True)
class Writing:
    """prompts and all references of each, of the whole validation split; prompts are there once, in order."""

    encoder: Encoder
    prompts: list[str]
    references: list[list[str]]


class TextGeneration(Task):
    """Rows are `{"prompt": str, "response": str}`; targets are the response's tokens and the end of text.

    An example's loss is the mean over its targets. The curve shows `loss_per_token` of the references; BLEU, ROUGE-L and NIST of
    `generate_examples` prompts (all references of each; 0: none) are taken after the last step, by greedy search or `beams`
    beams. validation_examples: evenly spaced rows whose loss is taken, 0: all. samples: prompts whose text, reference and
    continuation are put into the record, word for word; 0 where the text is a user's own, which may be nobody's business.
    """

    kind = "generation"
    metric = "loss_per_token"
    higher_is_better = False
    chance = None  # a language model has learned most of it before
    default_model = "smollm2-135m"
    default_head = "native"
    options: ClassVar[dict[str, Any]] = {
        "packing": False,
        "validation_examples": 0,
        "generate_examples": 64,
        "samples": 4,
        "beams": 1,
        "max_new_tokens": 64,
    }

    def identity(self, row: Example) -> str:
        """The prompt, where there is one: all its references are judged in one half."""
        return row.get("prompt") or super().identity(row)

    def validate(self) -> None:
        """Raises BadInput for packing and for numbers that are too small."""
        if self.settings["packing"]:
            raise BadInput(
                "Packing puts several examples into one sequence, whose gradient then belongs to all of them, so clipping it "
                "protects none alone; leave packing=false (batches are cut by length, so little is padding)."
            )
        lowest = {"validation_examples": 0, "generate_examples": 0, "samples": 0, "beams": 1, "max_new_tokens": 1}
        for key, least in lowest.items():
            if self.settings.get(key, least) < least:
                raise BadInput(f"{key} must be {least} or more, not {self.settings[key]}; correct it.")

    def lacking_model(self, model: str) -> list[Fetch]:
        """As `Task.lacking_model`, of any causal language model."""
        from dpft.tasks.model_sources import lacking

        return lacking(model)

    def bare_model(self, spec: ModelSpec) -> nn.Module:
        """As `Task.bare_model`."""
        from dpft.tasks import bare, models

        self._check_head(spec)
        source = models.resolve(spec.model)
        model = bare.causal(source)
        self._encoder(models.load_tokenizer(source), model, spec)
        return model

    def _encoder(self, tokenizer: Any, model: nn.Module, spec: ModelSpec) -> Encoder:
        """Raises CannotRun for what the model has no positions for."""
        from dpft.tasks import causal

        writes = self.settings["samples"] or self.settings["generate_examples"]
        new = self.settings["max_new_tokens"] if writes else 1
        return causal.Encoder(tokenizer, causal.longest_of(model.config), spec.max_length, spec.model, new)

    def _check_head(self, spec: ModelSpec) -> None:
        if spec.head != "native":
            raise CannotRun(f"The task {self.name} trains a model's own output layer; leave out head={spec.head}.")

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """Load the model with its own output layer and tokenise every row; `Encoder` says how. Raises CannotRun."""
        from dpft.tasks import causal, encoded, models

        self._check_head(spec)
        source = models.resolve(spec.model)
        tokenizer = models.load_tokenizer(source)
        model, weights = causal.load(source)
        encoder = self._encoder(tokenizer, model, spec)
        rows = _spread(data.validation, self.settings["validation_examples"])
        settings = {"max_length": spec.max_length}
        train, validation = (
            encoded.of(encoder, part, tokenizer, settings, self.encoded_on_disk) for part in (data.train, rows)
        )
        references: dict[str, list[str]] = {}
        for row in data.validation:
            references.setdefault(row["prompt"], []).append(row["response"].strip())
        return Prepared(
            model=model,
            train=train,
            validation=validation,
            train_lengths=encoded.lengths(train),
            validation_lengths=encoded.lengths(validation),
            collate=causal.Collator(encoder.pad_id),
            data_fingerprint=data.fingerprint,
            model_fingerprint=weights,
            writing=Writing(encoder, list(references), list(references.values())),
        )

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of each example's targets, shape [batch], in fp32 (fp64 for an fp64 model)."""
        return model(**batch) / _counts(batch)

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
        """(negative log-likelihood, number of targets) of each example."""
        return model(**batch).tolist(), _counts(batch).tolist()

    def make_metric(self) -> evaluate.Metric:
        """`loss_per_token` and `perplexity` of the references."""
        from dpft.tasks.metrics import make_perplexity

        return make_perplexity()

    def samples(self, prepared: Prepared, device: torch.device) -> list[dict[str, str]]:
        """What is generated for a few evenly spaced prompts, each beside its first reference."""
        if not self.settings["samples"]:
            return []
        writing = prepared.writing
        chosen = _spread(range(len(writing.prompts)), self.settings["samples"])
        texts = self._generated(prepared, chosen, device)
        return [
            {
                "prompt": writing.prompts[i][:SHOWN],
                "reference": writing.references[i][0][:SHOWN],
                "output": text[:SHOWN],
            }
            for i, text in zip(chosen, texts, strict=True)
        ]

    def last_metrics(self, prepared: Prepared, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
        """BLEU, ROUGE-L and NIST of evenly spaced prompts, with the libraries' versions and settings."""
        from dpft.tasks.metrics import make_text

        count = self.settings.get("generate_examples")
        if not count:
            return {}, {}
        chosen = _spread(range(len(prepared.writing.prompts)), count)
        metric = make_text()
        references = [prepared.writing.references[i] for i in chosen]
        found = metric.compute(predictions=self._generated(prepared, chosen, device), references=references)
        beams = self.settings["beams"]
        how = f"{len(chosen)} prompts, {'greedy search' if beams == 1 else f'{beams} beams'}, max_new_tokens " + str(
            self.settings["max_new_tokens"]
        )
        return found, {**metric.definitions, "generation": how}

    def _generated(self, prepared: Prepared, chosen: Sequence[int], device: torch.device) -> list[str]:
        from dpft.tasks.causal import generate

        prompts = [prepared.writing.prompts[i] for i in chosen]
        beams, new = self.settings["beams"], self.settings["max_new_tokens"]
        return generate(prepared.model, prepared.writing.encoder, prompts, device, beams, new)


def split(rows: list[Example], key: str) -> Data:
    """Hold out one in HELD_OUT of the different `row[key]`, those of the smallest sha256, with all rows that have them."""
    digests = {row[key]: hashlib.sha256(row[key].encode()).hexdigest() for row in rows}
    chosen = set(sorted(digests, key=digests.get)[: max(1, len(digests) // HELD_OUT)])
    train, validation = ([row for row in rows if (row[key] in chosen) is held] for held in (False, True))
    return Data(train, validation, fingerprint(train, validation))


def _spread(items: Sequence, count: int) -> list:
    """`count` of `items` (0: all), evenly spaced."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _counts(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from dpft.tasks.vocabulary import NO_TARGET

    return (batch["targets"] != NO_TARGET).sum(1)

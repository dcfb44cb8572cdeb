"""Image classification: what all tasks that give one label to an image share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Example, ModelSpec, Prepared
from dpft.tasks.classification import Classification, logits
from dpft.tasks.pixels import Collator, Form, Views

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import nn

    from dpft.tasks.hub import Fetch


class ImageClassification(Classification):
    """Rows are `{"image": uint8 array [channels, height, width], "label": int, "index": place in the split}`.

    Besides the attributes of `Classification`: `flips` (a mirror image is an image of the same class). A random view is the image
    moved by up to an eighth of its side in both directions, edges repeated, and where `flips`, mirrored every other time.
    """

    images = True
    default_head = "native"
    default_max_length = 1
    flips: ClassVar[bool] = False

    def lacking_model(self, model: str) -> list[Fetch]:
        """As `Task.lacking_model`, of any image model."""
        from dpft.tasks import pretraining

        return pretraining.lacking(model)

    def bare_model(self, spec: ModelSpec) -> nn.Module:
        """As `Task.bare_model`."""
        from dpft.tasks import bare, pretraining

        self._check_head(spec)
        model = bare.classifier(pretraining.resolve(spec.model), "native", self.classes, batch_norm=spec.batch_norm)
        if spec.views > 1:
            model.views = spec.views
        return model

    def _check_head(self, spec: ModelSpec) -> None:
        if spec.head != "native":
            raise CannotRun(f"Image models have their native head only, not {spec.head!r}; leave head out.")

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """Load the model; batches bring images to its size and scale. Raises CannotRun when it cannot be used."""
        import torch

        from dpft.tasks import models, pretraining

        self._check_head(spec)
        source = pretraining.resolve(spec.model)
        model, weights = models.load_model(source, "native", self.count(data), generator, batch_norm=spec.batch_norm)
        collate = Collator(Form.of(source, model.config))
        tokens, views = collate.form.tokens, None
        if spec.views > 1:
            model.views = spec.views
            views = Views(collate, spec.views, self.flips, int(torch.randint(2**62, (), generator=generator)))
        return Prepared(
            model=model,
            train=data.train,
            validation=data.validation,
            train_lengths=[tokens * spec.views] * len(data.train),
            validation_lengths=[tokens] * len(data.validation),
            collate=collate,
            data_fingerprint=data.fingerprint,
            model_fingerprint=weights,
            train_collate=views,
            public=data.public,
            **self.judged(data),
        )

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of each example, [batch], averaged over its views; one gradient is clipped (2204.13650)."""
        from torch.nn import functional

        scores, labels = logits(model, batch), batch["labels"]
        views = len(scores) // max(1, len(labels))
        losses = functional.cross_entropy(scores, labels.repeat_interleave(views), reduction="none")
        return losses.view(len(labels), -1).mean(1) if len(labels) else losses


def rows(images: Sequence[numpy.ndarray], labels: Sequence[int]) -> list[Example]:
    """Examples of one split."""
    return [
        {"image": image, "label": int(label), "index": i}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def fingerprint(*splits: Sequence[Example], note: str = "") -> str:
    """sha256 over `note` and all images and labels, in order."""
    digest = hashlib.sha256(note.encode())
    for split in splits:
        for row in split:
            digest.update(f"{row['image'].shape} {row['label']}\n".encode())
            digest.update(row["image"].tobytes())
        digest.update(b"--\n")
    return digest.hexdigest()

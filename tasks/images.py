"""Image classification: what all tasks that give one label to an image share; random views of training images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Example, ModelSpec, Prepared
from dpft.tasks.classification import Classification, logits

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import nn

STRIDE = 4  # of the first layers of a network without patches, as ResNet's


class ImageClassification(Classification):
    """Rows are `{"image": uint8 array [channels, height, width], "label": int, "index": place in the split}`.

    Besides the attributes of `Classification`: `flips` (a mirror image is an image of the same class). A random view is the image
    moved by up to an eighth of its side in both directions, edges repeated, and where `flips`, mirrored every other time.
    """

    images = True
    default_head = "native"
    default_max_length = 1
    flips: ClassVar[bool] = False

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """Load the model; batches bring images to its size and scale. Raises CannotRun when it cannot be used."""
        import torch

        from dpft.tasks import models, pretraining

        if spec.head != "native":
            raise CannotRun(f"Image models have their native head only, not {spec.head!r}; leave head out.")
        source = pretraining.resolve(spec.model)
        model, weights = models.load_model(source, "native", self.classes, generator, batch_norm=spec.batch_norm)
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


@dataclass(frozen=True)
class Form:
    """What a model takes: images of `size` (height, width) with `channels`, minus `mean` over `std`; `tokens`: positions it
    computes on, the measure of how much fits into a microbatch.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: int

    @classmethod
    def of(cls, source: str, config: Any) -> Form:
        """From preprocessor_config.json where there is one, else the configuration's image_size, and .5 for mean and std."""
        found = _preprocessor(source)
        size = found.get("size", getattr(config, "image_size", None))
        if isinstance(size, dict):
            size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if not all(isinstance(n, int) and n > 0 for n in size):
            raise CannotRun(f"{source} does not say what size its images have; give image_size in its config.json.")
        channels = config.num_channels
        mean, std = (tuple(found.get(key) or (0.5,) * channels) for key in ("image_mean", "image_std"))
        patch = getattr(config, "patch_size", None)
        patch = patch[0] if isinstance(patch, list | tuple) else patch or STRIDE
        return cls(size, channels, mean, std, max(1, (size[0] // patch) * (size[1] // patch)))


def _preprocessor(source: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(source)[0]
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class Collator:
    """Examples -> {"pixel_values": float [batch, channels, height, width], "labels": [batch]}."""

    form: Form

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels([e["image"] for e in examples]), "labels": _labels(examples)}

    def pixels(self, images: Sequence[numpy.ndarray]) -> torch.Tensor:
        """Scaled to the model's size (bilinear), grey repeated where it wants colours, normalised."""
        import numpy
        import torch
        from torch.nn import functional

        form = self.form
        if not images:
            return torch.zeros(0, form.channels, *form.size)
        pixels = torch.from_numpy(numpy.stack(images)).float() / 255
        if pixels.shape[1] != form.channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, form.channels, -1, -1)
        if pixels.shape[2:] != form.size:
            pixels = functional.interpolate(pixels, form.size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (form.mean, form.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class Views:
    """Examples of a training step -> `count` random views of each: pixel_values [batch, count, channels, height, width].

    The views of an example are a function of the seed, its index and the step, so neither microbatches nor a resumed run change
    them.
    """

    collate: Collator
    count: int
    flips: bool
    seed: int

    def __call__(self, examples: Sequence[Example], step: int) -> dict[str, torch.Tensor]:
        pixels = self.collate.pixels([view for e in examples for view in self.of(e, step)])
        return {"pixel_values": pixels.view(len(examples), self.count, *pixels.shape[1:]), "labels": _labels(examples)}

    def of(self, example: Example, step: int) -> list[numpy.ndarray]:
        """The views of one example in one step, uint8 like the image."""
        import numpy

        key = (self.seed, (example["index"] << 32) + step)
        random = numpy.random.Generator(numpy.random.Philox(key=key))
        return [shifted(example["image"], random, self.flips) for _ in range(self.count)]


def shifted(image: numpy.ndarray, random: numpy.random.Generator, flips: bool) -> numpy.ndarray:
    """The image [c, h, w] moved by up to an eighth of its side, edges repeated; mirrored every other time where `flips`."""
    import numpy

    height, width = image.shape[1:]
    reach = (max(1, height // 8), max(1, width // 8))
    top, left = (int(random.integers(0, 2 * r + 1)) for r in reach)
    view = numpy.pad(image, ((0, 0), (reach[0],) * 2, (reach[1],) * 2), "edge")[
        :, top : top + height, left : left + width
    ]
    return view[:, :, ::-1] if flips and random.random() < 0.5 else view


def _labels(examples: Sequence[Example]) -> torch.Tensor:
    import torch

    return torch.tensor([e["label"] for e in examples], dtype=torch.int64)

"""From images to what a model takes: its size and scale, batches, random views of training images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import CannotRun, first_line
from dpft.tasks.base import Example

if TYPE_CHECKING:
    import numpy
    import torch

STRIDE = 4  # of the first layers of a network without patches, as ResNet's


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


def decoded(content: bytes | None, channels: int, where: str, size: int = 0) -> numpy.ndarray:
    """An image file as uint8 [channels, height, width], upright; size: 0, or the side of the square in its middle that is kept.

    Raises CannotRun, naming `where`, when it cannot be decoded.
    """
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
            pixels = numpy.asarray(ImageOps.fit(upright, (size, size)) if size else upright)
    except (TypeError, ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:
        reason = first_line(error, "unreadable")
        raise CannotRun(f"The image in {where} cannot be decoded ({reason}); copy the file again.") from error
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


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

"""Task `digits`: real handwritten digits from scikit-learn, offline; some classes are public and pretrain the models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dpft.tasks import grouping
from dpft.tasks.base import Data, Example
from dpft.tasks.handwriting import PRIVATE, PUBLIC, of_classes
from dpft.tasks.images import ImageClassification, fingerprint, rows

TRAIN, VALIDATION = 800, 277


class Digits(grouping.MadeUp, ImageClassification):
    """Which of the digits 4 to 9; those of 0 to 3 are the public data that `digits-vit` and `digits-resnet` were trained on.

    So pretraining has seen pen strokes, but none of these classes and none of these images. Who wrote them is not known;
    user_rows: how many of them make a made-up user.
    """

    name = "digits"
    version = 1
    description = (
        "handwritten digits 4 to 9, 8x8 pixels, offline; public pretraining on the classes 0 to 3, which are held apart"
    )
    source = "Alpaydin and Kaynak 1998 (UCI, optical recognition of handwritten digits), in scikit-learn; CC BY 4.0"
    classes = len(PRIVATE)
    chance = 0.188  # share of the largest class in validation
    threshold = 0.80
    public = "the digits 0 to 3, which pretrained the models"
    default_model = "digits-vit"

    def train_size(self, data_dir: Path | None) -> int:
        """Number of private training images; a constant."""
        return TRAIN

    def load(self, data_dir: Path | None) -> Data:
        """Read the private classes; labels count from the first of them."""
        images, labels = of_classes(PRIVATE)
        keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]  # the split depends on content alone
        held_out = set(sorted(keys)[:VALIDATION])
        parts = [[i for i, key in enumerate(keys) if (key in held_out) == validation] for validation in (False, True)]
        train, validation = (rows([images[i] for i in part], [labels[i] for i in part]) for part in parts)
        note = f"private classes {PRIVATE}, public pretraining on classes {PUBLIC}\n"
        made_up, own = self.settings["user_rows"], [key for key in keys if key not in held_out]
        users = grouping.by_hash(own, made_up) if made_up else ()
        return Data(train, validation, fingerprint(train, validation, note=note), users=users)

    def public_rows(self, data_dir: Path | None) -> Sequence[Example]:
        """The public classes, in the order of their hashes; their labels count from 0, as those of other digits do."""
        found = sorted(
            zip(*of_classes(PUBLIC), strict=True), key=lambda pair: hashlib.sha256(pair[0].tobytes()).hexdigest()
        )
        return rows([image for image, _ in found], [label for _, label in found])

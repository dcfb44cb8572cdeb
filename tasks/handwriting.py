"""Handwritten digits from scikit-learn, and which of their classes are public: those of the pretraining, not of the task."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

PUBLIC = (0, 1, 2, 3)  # these classes are public: models are pretrained on them and nothing else
PRIVATE = (4, 5, 6, 7, 8, 9)


def of_classes(classes: tuple[int, ...]) -> tuple[list[numpy.ndarray], list[int]]:
    """(images uint8 [1, 8, 8], labels that count from 0) of some of the ten classes, in the order of the file."""
    images, digits = _all()
    kept = [i for i, digit in enumerate(digits) if digit in classes]
    return [images[i] for i in kept], [classes.index(digits[i]) for i in kept]


@cache
def _all() -> tuple[numpy.ndarray, list[int]]:
    import numpy
    from sklearn.datasets import load_digits

    found = load_digits()
    images = numpy.rint(found.images * (255 / 16)).astype("uint8")  # stored as 0 to 16
    return images[:, None], found.target.tolist()

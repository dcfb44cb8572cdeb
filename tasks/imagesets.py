"""CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, from a local parquet mirror or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks import mirror
from dpft.tasks.base import Data, Example
from dpft.tasks.downloads import data_root
from dpft.tasks.hub import Fetch
from dpft.tasks.images import ImageClassification, fingerprint, rows
from dpft.tasks.pixels import decoded


class ImageSet(ImageClassification):
    """Base of these tasks: `columns` are the image (its file's bytes) and the label, `train_rows` the size on the hub.

    A mirror is `<data_dir>/<hub>/<split>.parquet`, as the hub serves it. The hub's test split is used for evaluation.
    """

    version = 1
    columns: ClassVar[tuple[str, str]] = ("image", "label")
    train_rows: ClassVar[int]
    classes = 10
    channels: ClassVar[int] = 3
    chance = 0.1
    default_model = "google/vit-base-patch16-224-in21k"

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training images: from the mirror's parquet metadata, else the size of the hub's split."""
        root = data_root(data_dir)
        return self.train_rows if root is None else mirror.count_of(self.hub, "train", root)

    def lacking(self, data_dir: Path | None) -> list[Fetch]:
        """As `Task.lacking`; of a mirror, whether both splits have their columns."""
        return mirror.lacking(self.hub, ("train", "test"), data_root(data_dir), self.columns)

    def load(self, data_dir: Path | None) -> Data:
        """Read and decode train and test. Raises CannotRun, naming the file and row, when something is missing or damaged."""
        root = data_root(data_dir)
        train, test = (self._split(*mirror.split_of(self.hub, split, root)) for split in ("train", "test"))
        return Data(train, test, fingerprint(train, test))

    def _split(self, table, where: str) -> list[Example]:
        image, label = self.columns
        if lacking := [column for column in self.columns if column not in table.columns]:
            raise CannotRun(f"{where} has no column {lacking[0]}; {self.name} needs {image} and {label}.")
        if table.is_empty():
            raise CannotRun(f"{where} has no rows; put the whole split there.")
        labels = table[label].to_list()
        for number, value in enumerate(labels):
            if not isinstance(value, int) or not 0 <= value < self.classes:
                raise CannotRun(
                    f"{where} has the label {value} in row {number}; {self.name} knows 0 to {self.classes - 1}."
                )
        images = [
            decoded(cell.get("bytes") if isinstance(cell, dict) else cell, self.channels, f"row {number} of {where}")
            for number, cell in enumerate(table[image])
        ]
        return rows(images, labels)


class Cifar10(ImageSet):
    """Ten kinds of things and animals in colour, 32x32."""

    name = "cifar10"
    hub = "uoft-cs/cifar10/plain_text"
    description = "small photographs of ten kinds of things and animals (CIFAR-10)"
    source = "Krizhevsky 2009; research use"
    columns = ("img", "label")
    train_rows = 50000
    threshold = 0.80
    flips = True


class Cifar100(ImageSet):
    """A hundred kinds of things and animals in colour, 32x32."""

    name = "cifar100"
    hub = "uoft-cs/cifar100/cifar100"
    description = "small photographs of a hundred kinds of things and animals (CIFAR-100)"
    source = "Krizhevsky 2009; research use"
    columns = ("img", "fine_label")
    train_rows = 50000
    classes = 100
    chance = 0.01
    threshold = 0.50
    flips = True


class Mnist(ImageSet):
    """Handwritten digits, 28x28 in grey."""

    name = "mnist"
    hub = "ylecun/mnist/mnist"
    description = "handwritten digits (MNIST)"
    source = "LeCun et al. 1998; MIT licence on the hub"
    train_rows = 60000
    channels = 1
    chance = 0.114
    threshold = 0.90


class FashionMnist(ImageSet):
    """Ten kinds of clothing, 28x28 in grey."""

    name = "fashion-mnist"
    hub = "zalando-datasets/fashion_mnist/fashion_mnist"
    description = "pictures of ten kinds of clothing (Fashion-MNIST)"
    source = "Xiao et al. 2017, arXiv 1708.07747; MIT licence"
    train_rows = 60000
    channels = 1
    threshold = 0.75
    flips = True

"""Task `images`: images in a folder of the user's own, in a folder for each class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks.base import Data
from dpft.tasks.images import ImageClassification, fingerprint
from dpft.tasks.own import columns, holdout, paths
from dpft.tasks.own.base import OwnFiles, notes
from dpft.tasks.pixels import decoded

if TYPE_CHECKING:
    import numpy

ENDINGS = (".png", ".jpg", ".jpeg")
SPLITS = {"train", "validation"}


class ImageFolder(OwnFiles, ImageClassification):
    """`folder` holds `<class>/<image>.png` or `.jpg`, or folders `train` and `validation` that hold such.

    validation: the share of the images that is held out where there are no such folders. size: 0 where all images have one
    size; else the square in the middle of each that is kept, scaled to so many pixels. Images are read as colours.
    """

    name = "images"
    description = "classes of the images in your own folder, <class>/<image>.png or .jpg; an image is an example"
    metrics = ("accuracy", "macro_f1")
    chance = threshold = None  # both follow from the labels
    default_model = "digits-vit"
    options: ClassVar[dict[str, Any]] = {**OwnFiles.options, "folder": "", "validation": "0.1", "size": 0}

    def validate(self) -> None:
        """Raises BadInput without a folder, and for numbers that cannot be."""
        if not self.settings["folder"]:
            raise BadInput(
                "The task images needs a folder with a folder for each class; give it with --set folder=PATH."
            )
        if holdout.fraction(self.settings["validation"]) is None:
            raise BadInput(
                f"validation must be a share between 0 and 1, not {self.settings['validation']}; correct it."
            )
        if self.settings["size"] < 0:
            raise BadInput(f"size must be 0 or a number of pixels, not {self.settings['size']}; correct it.")

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        """The images by their paths in the folder."""
        self.validate()
        root = paths.folder(self.settings["folder"], data_dir)
        found = {}
        for place, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            images = [name for name in names if Path(name).suffix.lower() in ENDINGS and not name.startswith(".")]
            found |= {(Path(place) / name).relative_to(root).as_posix(): Path(place) / name for name in images}
        if not found:
            raise CannotRun(f"{root} holds no {', '.join(ENDINGS)} files; give a folder with a folder for each class.")
        return dict(sorted(found.items()))

    def read(self, files: Mapping[str, Path]) -> Data:
        splits = {key.split("/")[0] for key in files} == SPLITS
        placed = [self._placed(key, path, splits) for key, path in files.items()]
        names = columns.names([name for _, name in placed], self.settings["folder"])
        number = {name: label for label, name in enumerate(names)}
        images = self._images(list(files.values()))
        keys = [image.digest for image in images]
        all_rows = [(image, number[name], key) for (_, name), image, key in zip(placed, images, keys, strict=True)]
        if splits:
            parts = [
                [row for row, (split, _) in zip(all_rows, placed, strict=True) if split == wanted]
                for wanted in ("train", "validation")
            ]
        else:
            share = holdout.fraction(self.settings["validation"])
            parts = holdout.held_out(all_rows, keys, share, self.settings["folder"])
        both = holdout.shared(*([key for _, _, key in part] for part in parts))
        train, validation = ([ImageRow(*row[:2], i) for i, row in enumerate(part)] for part in parts)
        found = notes(names, train, validation, both, "images")
        return Data(train, validation, fingerprint(train, validation), (), names, found)

    def _placed(self, key: str, path: Path, splits: bool) -> tuple[str, str]:
        """(split, class) of an image. Raises CannotRun where its folder says neither."""
        parts = key.split("/")
        if len(parts) != 2 + splits:
            layout = "<split>/<class>/<image>" if splits else "<class>/<image>"
            raise CannotRun(
                f"{path} does not lie as {layout} in {self.settings['folder']}; move it, or give another folder."
            )
        return parts[0] if splits else "", parts[-2]

    def _images(self, files: list[Path]) -> list[ImageFile]:
        first = ImageFile.of(files[0], self.settings["size"])
        shape = first.pixels().shape
        return [ImageFile.of(path, self.settings["size"], (files[0], shape)) for path in files]


@dataclass(frozen=True)
class ImageFile:
    """An image that is decoded whenever it is asked for, and not kept.

    digest: sha256 of the file, which must stay the same. size: as of `decoded`. like: another file and the shape that both have.
    """

    path: Path
    digest: bytes
    size: int
    like: tuple[Path, tuple[int, ...]] | None

    @classmethod
    def of(cls, path: Path, size: int, like: tuple[Path, tuple[int, ...]] | None = None) -> ImageFile:
        """Raises CannotRun, naming it, for a file that cannot be read."""
        return cls(path, hashlib.sha256(_content(path)).digest(), size, like)

    def pixels(self) -> numpy.ndarray:
        """uint8 [3, height, width]. Raises CannotRun, naming it, for one that changed, is no image or has another size."""
        content = _content(self.path)
        if hashlib.sha256(content).digest() != self.digest:
            raise CannotRun(
                f"{self.path} has changed since it was first read; leave the folder alone while it is in use."
            )
        found = decoded(content, 3, str(self.path), self.size)
        if self.like is not None and found.shape != self.like[1]:
            mine, first = (" x ".join(str(side) for side in shape[:0:-1]) for shape in (found.shape, self.like[1]))
            raise CannotRun(
                f"{self.path} has {mine} pixels and {self.like[0]} has {first}; give all one size, for example with "
                "--set size=224."
            )
        return found


class ImageRow(Mapping):
    """A row as those of other image tasks, whose `image` is decoded each time that it is looked up."""

    def __init__(self, file: ImageFile, label: int, index: int):
        self._held = {"image": file, "label": label, "index": index}

    def __getitem__(self, key: str) -> Any:
        return self._held[key].pixels() if key == "image" else self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CannotRun(f"Cannot read {path} ({error.strerror}); check the file and its permissions.") from error

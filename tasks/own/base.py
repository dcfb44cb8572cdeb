"""What all tasks on a user's own files share: the digest of the files is part of the run id, and rows are read once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Example, Task
from dpft.tasks.own import paths

FEW = 10  # training rows of a class: with fewer, noise drowns it


class OwnFiles(Task):
    """Base: `files` says which files the settings name, `read` makes rows of them.

    `content` is filled in when a run is resolved: the first digits of the sha256 of the files, so that runs on edited files are
    other runs. Where it is given it must be that of the files, or nothing is loaded.
    """

    version = 1
    source = "the user's own file"
    options: ClassVar[dict[str, Any]] = {"content": ""}

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        """The files by what they are called in the digest. Raises CannotRun for one that is not there."""
        raise NotImplementedError

    def read(self, files: Mapping[str, Path]) -> Data:
        """The rows. Raises CannotRun, naming the file and where in it, for whatever is wrong."""
        raise NotImplementedError

    def pinned(self, data_dir: Path | None) -> dict[str, Any]:
        """The digest. The rows are read too: what is wrong is said now, before there is a record that could quote a row."""
        self.load(data_dir)
        return {"content": paths.content(self.files(data_dir))}

    def about(self, data_dir: Path | None) -> dict[str, Any]:
        """The digest, as runs have it in their ids."""
        return {"content": paths.content(self.files(data_dir))}

    def load(self, data_dir: Path | None) -> Data:
        """The rows, read once. Raises CannotRun where the files are not those of `content`, and as `read`."""
        files = self.files(data_dir)
        found, asked = paths.content(files), self.settings["content"]
        if asked not in ("", found):
            raise CannotRun(
                f"{next(iter(files.values()))} is not what was asked for: its content is {found}, not {asked}; put the old one "
                "back, or make new runs of this one."
            )
        plain = {key: value for key, value in self.settings.items() if key != "content"}
        return _read(type(self), json.dumps(plain, sort_keys=True), tuple(files.items()), found)


@lru_cache(maxsize=2)  # every run of a grid asks for the same rows, more than once
def _read(kind: type[OwnFiles], settings: str, files: tuple[tuple[str, Path], ...], content: str) -> Data:
    return kind(json.loads(settings)).read(dict(files))


def notes(
    classes: Sequence[str], train: Sequence[Example], validation: Sequence[Example], both: int, what: str
) -> tuple[str, ...]:
    """What the owner of labelled rows should know. both: how many of validation are in train, too; what: rows are called."""
    found, counts = [], Counter(row["label"] for row in train)
    if few := [f"{name!r} {counts[label]}" for label, name in enumerate(classes) if counts[label] < FEW]:
        listed = ", ".join(few[:FEW]) + (", ..." if len(few) > FEW else "")
        found.append(f"Classes with fewer than {FEW} training {what}, of which noise leaves little: {listed}.")
    if both:
        found.append(
            f"{both} of {len(validation)} validation {what} are in train, too, so there accuracy shows memory; they are kept, "
            "take them out of one of the files."
        )
    return tuple(found)

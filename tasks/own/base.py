"""What all tasks on a user's own files share: the digest of the files is part of the run id, and rows are read once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Example, Task
from dpft.tasks.own import columns, paths, tabular

FEW = 10  # training rows of a class: with fewer, noise drowns it


class OwnFiles(Task):
    """Base: `files` says which files the settings name, `read` makes rows of them.

    `content` is filled in when a run is resolved: the first digits of the sha256 of the files, so that runs on edited files are
    other runs. Where it is given it must be that of the files, or nothing is loaded.
    """

    version = 1
    source = "the user's own file"
    options: ClassVar[dict[str, Any]] = {"content": ""}

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        if self.settings.get("user"):
            self.users = f"whom the column {self.settings['user']} names"

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        """The files by what they are called in the digest. Raises CannotRun for one that is not there."""
        raise NotImplementedError

    def read(self, files: Mapping[str, Path]) -> Data:
        """The rows. Raises CannotRun, naming the file and where in it, for whatever is wrong."""
        raise NotImplementedError

    def owners(self, path: Path) -> list[str]:
        """The user of every row of a table; nothing where no column says it. Raises CannotRun as `read`."""
        column = self.settings["user"]
        return columns.classes(tabular.read(path), column, "users") if column else []

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


def with_users(data: Data, rows: Sequence[Example], users: Sequence[str]) -> Data:
    """`data` with the user of each training row; rows: those very rows, and others, in the order of `users` (none: as it is)."""
    owner = {id(row): user for row, user in zip(rows, users, strict=bool(users))}
    return replace(data, users=[owner[id(row)] for row in data.train]) if users else data


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

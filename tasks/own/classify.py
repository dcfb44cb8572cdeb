"""Task `classify`: a label for each text, or each pair of texts, of a table of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.classification import TextClassification
from dpft.tasks.own import columns, holdout, paths, tabular
from dpft.tasks.own.base import OwnFiles, notes, with_users


class Classify(OwnFiles, TextClassification):
    """`file` has a column of texts (`text`), of labels (`label`), and where two texts are compared of others (`text2`).

    validation: a file with the same columns, or the share of the rows of `file` that is held out (`holdout.held_out`). public:
    a file with the same columns that is nobody's private data, for the methods that learn from such. Labels are names or whole
    numbers; the classes are those of `file`, in order. user: the column of `file` that says whose each row is; a share is
    then held out user by user.
    """

    name = "classify"
    description = "labels of texts in your own file (CSV, TSV, parquet or JSON lines); a row is an example"
    metrics = ("accuracy", "macro_f1")
    chance = threshold = None  # both follow from the labels
    options: ClassVar[dict[str, Any]] = {
        **OwnFiles.options,
        "file": "",
        "text": "text",
        "label": "label",
        "text2": "",
        "user": "",
        "validation": "0.1",
        "public": "",
    }

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        if self.settings["public"]:
            self.public = "the user's own public file"

    def validate(self) -> None:
        """Raises BadInput without a file, and for a share that is none."""
        if not self.settings["file"]:
            raise BadInput("The task classify needs a file with texts and labels; give it with --set file=PATH.")
        holdout.fraction(self.settings["validation"])
        named = [self.settings[key] for key in ("text", "label", "text2", "user") if self.settings[key]]
        if twice := next((name for i, name in enumerate(named) if name in named[:i]), None):
            raise BadInput(f"The column {twice} cannot be two of text, label, text2 and user; name another one.")

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        self.validate()
        named = {key: self.settings[key] for key in ("file", "validation", "public")}
        if holdout.fraction(named["validation"]) is not None:
            del named["validation"]
        found = {key: paths.file(name, data_dir) for key, name in named.items() if name}
        for key in ("validation", "public"):
            if key in found and found[key].samefile(found["file"]):
                raise CannotRun(f"{key} and file are one file, {found['file']}; give {key} another one.")
        return found

    def read(self, files: Mapping[str, Path]) -> Data:
        rows, labels = self._rows(files["file"])
        names = columns.names(labels, str(files["file"]))
        number = {name: label for label, name in enumerate(names)}
        every = train = [{**row, "label": number[label]} for row, label in zip(rows, labels, strict=True)]
        users = self.owners(files["file"])
        others = {
            key: self._labelled(files[key], number, files["file"]) for key in ("validation", "public") if key in files
        }
        if (validation := others.get("validation")) is None:
            share = holdout.fraction(self.settings["validation"])
            own = [user.encode() for user in users] or keys(train)
            train, validation = holdout.held_out(train, own, share, str(files["file"]))
        if leaks := holdout.shared(keys([*train, *validation]), keys(others.get("public", ()))):
            raise CannotRun(
                f"{leaks} rows of {files['public']} are in the private data, too, and cannot be both; take them out of one."
            )
        both = holdout.shared(keys(train), keys(validation))
        found = notes(names, train, validation, both, "texts")
        public = sorted(others.get("public", ()), key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())
        data = Data(train, validation, fingerprint(train, validation), public, names, found)
        return with_users(data, every, users)

    def identity(self, row: Example) -> str:
        """The texts as the split knows them."""
        return keys([row])[0].decode()

    def about(self, data_dir: Path | None) -> dict[str, Any]:
        """The digest, and the columns of `file`."""
        return {**super().about(data_dir), "columns": list(tabular.read(self.files(data_dir)["file"]).columns)}

    def load(self, data_dir: Path | None) -> Data:
        """As `OwnFiles.load`; public rows are handed to the methods that need them, by `public_rows`."""
        return replace(super().load(data_dir), public=())

    def public_rows(self, data_dir: Path | None) -> Sequence[Example]:
        """Rows of the public file, in the order of the sha256 of their texts."""
        return super().load(data_dir).public if self.public else super().public_rows(data_dir)

    def _rows(self, path: Path) -> tuple[list[Example], list[str]]:
        table = tabular.read(path)
        named = {"text": self.settings["text"], "pair": self.settings["text2"]}
        named = {key: column for key, column in named.items() if column}
        return columns.texts(table, named, words=("text",)), columns.classes(table, self.settings["label"])

    def _labelled(self, path: Path, number: Mapping[str, int], file: Path) -> list[Example]:
        rows, labels = self._rows(path)
        if unknown := next((label for label in labels if label not in number), None):
            raise CannotRun(f"{path} has the label {columns.short(unknown)}, which {file} has not; mend one of them.")
        return [{**row, "label": number[label]} for row, label in zip(rows, labels, strict=True)]


def keys(rows: Sequence[Example]) -> list[bytes]:
    """What says whether two rows have the same text."""
    return ["\n".join(holdout.normalised(row[key]) for key in ("text", "pair") if key in row).encode() for row in rows]

"""Tasks `causal-lm` and `instruction`: language modelling and instruction tuning on a table of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.generation import TextGeneration, split
from dpft.tasks.own import columns, paths, tabular
from dpft.tasks.own.base import OwnFiles, with_users

UNPINNED = (".jsonl", ".parquet")  # read before run ids knew of content; their ids stay


class TextFile(OwnFiles, TextGeneration):
    """Base: `file` holds the training rows, `validation_file` those for evaluation.

    Without a `validation_file` one in ten of the different texts (`held_out_by`) is held out. One row is one example; `user`
    names the column that says whose it is, for runs that protect users. Run ids of JSONL and parquet files are older than
    `content` and know the path alone; there a finished run is held against the fingerprint of the rows.
    """

    threshold = 3.0
    options: ClassVar[dict[str, Any]] = {
        **TextGeneration.options,
        **OwnFiles.options,
        "samples": 0,
        "file": "",
        "validation_file": "",
        "user": "",
    }
    held_out_by: ClassVar[str]

    def validate(self) -> None:
        super().validate()
        if not self.settings["file"]:
            raise BadInput(f"The task {self.name} needs a file with texts; give it with --set file=PATH.")

    def pinned(self, data_dir: Path | None) -> dict[str, Any]:
        """As `OwnFiles.pinned`, except for files whose runs have ids without it."""
        named = [self.settings[key] for key in ("file", "validation_file") if self.settings[key]]
        younger = (
            self.settings["content"] or self.settings["user"]
        )  # the fingerprint of the rows does not know whose they are
        plain = all(Path(name).suffix in UNPINNED for name in named) and not younger
        return {} if plain else super().pinned(data_dir)

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        self.validate()
        named = {key: self.settings[key] for key in ("file", "validation_file")}
        return {key: paths.file(name, data_dir) for key, name in named.items() if name}

    def read(self, files: Mapping[str, Path]) -> Data:
        parts = {key: self.rows(columns.texts(tabular.read(path), self.columns())) for key, path in files.items()}
        train, users = parts["file"], self.owners(files["file"])
        if (validation := parts.get("validation_file")) is not None:
            return with_users(Data(train, validation, fingerprint(train, validation)), train, users)
        found = split(train, self.held_out_by)
        if not found.train:
            raise CannotRun(
                f"{files['file']} has too few different texts to hold one in ten out; give validation_file=."
            )
        return with_users(found, train, users)

    def about(self, data_dir: Path | None) -> dict[str, Any]:
        """The digest, and the columns of `file`."""
        return {**super().about(data_dir), "columns": list(tabular.read(self.files(data_dir)["file"]).columns)}

    def columns(self) -> dict[str, str]:
        """Key -> column of the file."""
        raise NotImplementedError

    def rows(self, rows: list[Example]) -> list[Example]:
        """Rows of the file as `{"prompt", "response"}`."""
        raise NotImplementedError


class CausalLanguageModelling(TextFile):
    """Every token of a text is a target, the first one from the start-of-text token; nothing is generated."""

    name = "causal-lm"
    description = "language modelling of a text column of your own file; a row is an example"
    held_out_by = "response"
    options: ClassVar[dict[str, Any]] = {**TextFile.options, "text": "text", "generate_examples": 0}

    def validate(self) -> None:
        super().validate()
        for key in ("generate_examples", "samples"):
            if self.settings[key]:
                raise BadInput(f"The task causal-lm has no prompts to generate from; leave {key}=0.")

    def columns(self) -> dict[str, str]:
        return {"response": self.settings["text"]}

    def rows(self, rows: list[Example]) -> list[Example]:
        return [{"prompt": "", "response": row["response"]} for row in rows]


class Instruction(TextFile):
    """A prompt and its response; the response's tokens and the end of text are targets, what separates the two is not."""

    name = "instruction"
    description = "responses to prompts, two columns of your own file; the loss is that of the response"
    held_out_by = "prompt"
    options: ClassVar[dict[str, Any]] = {**TextFile.options, "prompt": "prompt", "response": "response"}

    def columns(self) -> dict[str, str]:
        return {key: self.settings[key] for key in ("prompt", "response")}

    def rows(self, rows: list[Example]) -> list[Example]:
        return [{"prompt": f"{row['prompt'].rstrip()}\n", "response": row["response"].strip()} for row in rows]

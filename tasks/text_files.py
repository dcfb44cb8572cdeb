"""Language modelling and instruction tuning on a user's own text: a parquet or JSONL file given by an option."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from dpft.harness.errors import BadInput
from dpft.tasks import frames
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.downloads import data_root
from dpft.tasks.generation import TextGeneration, split


class TextFile(TextGeneration):
    """Base: `file` (a path, or a path in the mirror folder) holds the training rows, `validation_file` those for evaluation.

    Without a `validation_file` one in ten of the different texts (`held_out_by`) is held out. One row is one example: whoever
    has several rows in the file is protected row by row.
    """

    version = 1
    source = "the user's own file"
    threshold = 3.0
    options: ClassVar[dict[str, Any]] = {**TextGeneration.options, "samples": 0, "file": "", "validation_file": ""}
    held_out_by: ClassVar[str]

    def validate(self) -> None:
        super().validate()
        if not self.settings["file"]:
            raise BadInput(f"The task {self.name} needs a parquet or JSONL file; give it with --set file=PATH.")

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training rows; the file is read for it."""
        return len(self.load(data_dir).train)

    def load(self, data_dir: Path | None) -> Data:
        """Read the rows. Raises CannotRun, naming the file, when it is missing, damaged or lacks a column."""
        train = self._read(data_dir, self.settings["file"])
        if not self.settings["validation_file"]:
            return split(train, self.held_out_by)
        validation = self._read(data_dir, self.settings["validation_file"])
        return Data(train, validation, fingerprint(train, validation))

    def _read(self, data_dir: Path | None, name: str) -> list[Example]:
        path, root = Path(name).expanduser(), data_root(data_dir)
        if not path.is_file() and root is not None and (root / path).is_file():
            path = root / path
        return self.rows(frames.texts(frames.from_file(path), self.columns(), str(path)))

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

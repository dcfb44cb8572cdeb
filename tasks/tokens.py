"""From rows to encoded examples, and from encoded examples to padded batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Example
from dpft.tasks.loaders import quiet
from dpft.tasks.prompts import Prompt, Slot, shortened

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096  # rows tokenised at once


@dataclass(frozen=True)
class Fields:
    """What the inputs of one architecture look like.

    pad_id: token that fills up; segments: number of token types, 0 when the model takes none; first_position: position
    of the first token, None when the model takes no positions; pad_position: position of padding, None to count on;
    longest: most tokens the model takes, None when there is no limit.
    """

    pad_id: int
    segments: int
    first_position: int | None
    pad_position: int | None
    longest: int | None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Fields:
        """Read from the forward signature and the embedding layers, so that unlisted architectures work too."""
        encoder, config = model.encoder, model.config
        accepted = inspect.signature(getattr(model, "model", encoder).forward).parameters
        segments = (getattr(config, "type_vocab_size", 0) or 0) if "token_type_ids" in accepted else 0
        table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # RoBERTa's: positions count on from behind it
        first = 0 if padding is None else padding + 1
        longest = getattr(config, "max_position_embeddings", None) if table is None else table.num_embeddings - first
        if "position_ids" not in accepted:
            first = padding = None
        if tokenizer.pad_token_id is None:
            raise CannotRun("This model's tokenizer has no padding token; take an encoder such as roberta-base.")
        return cls(tokenizer.pad_token_id, segments, first, padding, longest if longest and longest > 0 else None)

    def checked_length(self, max_length: int, model: str) -> int:
        """`max_length`, or CannotRun when the model takes fewer tokens."""
        if self.longest is not None and max_length > self.longest:
            raise CannotRun(f"{model} takes at most {self.longest} tokens; lower max_length from {max_length}.")
        return max_length


@dataclass(frozen=True)
class Encoder:
    """Turns rows into encoded examples: int32 arrays, a quarter of the memory of lists of ints."""

    tokenizer: PreTrainedTokenizerBase
    fields: Fields
    max_length: int
    prompt: Prompt | None = None

    def __call__(self, rows: Sequence[Example]) -> list[Example]:
        """Encode all rows, in order, without padding. Raises CannotRun when `max_length` leaves no room for text."""
        if self.prompt is None:
            fixed = self.tokenizer.num_special_tokens_to_add(pair=bool(rows) and "pair" in rows[0])
        else:
            fixed = self.prompt.fixed
        if self.max_length <= fixed + 1:
            raise CannotRun(f"max_length {self.max_length} leaves no room for text; it must be above {fixed + 1}.")
        encoded: list[Example] = []
        with quiet():  # a text beyond the tokenizer's own limit is cut here, no reason to warn
            for start in range(0, len(rows), CHUNK):
                chunk = rows[start : start + CHUNK]
                encoded.extend(self._plain(chunk) if self.prompt is None else self._prompted(chunk))
        return encoded

    def _plain(self, rows: Sequence[Example]) -> Iterator[Example]:
        texts = [[row[column] for row in rows] for column in ("text", "pair") if column in rows[0]]
        out = self.tokenizer(
            *texts,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=self.fields.segments > 1,
            return_attention_mask=False,
        )
        for index, row in enumerate(rows):
            example = {"input_ids": np.array(out["input_ids"][index], np.int32), "labels": row["label"]}
            if self.fields.segments > 1:
                types = np.array(out["token_type_ids"][index], np.int32)
                example["token_type_ids"] = np.minimum(types, self.fields.segments - 1)
            yield example

    def _prompted(self, rows: Sequence[Example]) -> Iterator[Example]:
        slots = sorted((part for part in self.prompt.parts if isinstance(part, Slot)), key=lambda slot: slot.index)
        columns = []
        for slot in slots:
            texts = [slot.rewrite(row["pair" if slot.index else "text"]) for row in rows]
            columns.append(self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        for row, *sentences in zip(rows, *columns, strict=True):
            ids, position = self.prompt.assemble(shortened(sentences, self.max_length - self.prompt.fixed))
            yield {"input_ids": np.array(ids, np.int32), "labels": row["label"], "mask_position": position}


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples to the longest of them. Picklable, so that workers can have it."""

    fields: Fields
    prompted: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """One batch of int64 tensors, [batch, longest] (at least one column), `labels` and `mask_position` [batch].

        Positions are given explicitly, [batch, longest]: left to itself BERT broadcasts ONE row of position embeddings
        over the batch, and the position gradients of single examples can then not be told apart.
        """
        import torch

        shape = (len(examples), max((len(example["input_ids"]) for example in examples), default=1))
        ids = np.full(shape, self.fields.pad_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = example["input_ids"]
            mask[row, :length] = 1
            types[row, :length] = example.get("token_type_ids", 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.fields.segments:
            batch["token_type_ids"] = types
        if self.fields.first_position is not None:
            positions = np.tile(np.arange(shape[1]) + self.fields.first_position, (shape[0], 1))
            if self.fields.pad_position is not None:
                positions[mask == 0] = self.fields.pad_position
            batch["position_ids"] = positions
        for name in ("mask_position", "labels") if self.prompted else ("labels",):
            batch[name] = np.array([example[name] for example in examples], np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

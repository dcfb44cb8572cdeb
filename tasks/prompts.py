"""Prompts of LM-BFF: an example as a sentence with one masked word (Gao et al. 2021, arXiv 2012.15723)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCE = re.compile(r"(\+?)sent(-?)(l?)_([01])")


@dataclass(frozen=True)
class Slot:
    """A place for sentence `index` (0 text, 1 pair) and how it is rewritten before it is tokenised."""

    index: int
    rewrite: Callable[[str], str]


@dataclass(frozen=True)
class Prompt:
    """A template as alternating token ids and slots, with the tokens that stand for the labels.

    parts: lists of token ids, slots, and None for the mask; words: token id per label; fixed: tokens that are not a
    sentence's and are never truncated.
    """

    parts: tuple[list[int] | Slot | None, ...]
    words: tuple[int, ...]
    mask_id: int

    @property
    def fixed(self) -> int:
        return sum(1 if part is None else len(part) for part in self.parts if not isinstance(part, Slot))

    @classmethod
    def of(cls, template: str, label_words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Read `template` in the notation of LM-BFF's code: `*cls*`, `*sep+*`, `*mask*`, `*sent_0*`, literal text.

        `_` in literals is a space; `sent-` drops closing punctuation, `+sent` puts a space before, `sentl` makes the
        first letter small. Raises CannotRun when the tokenizer has no mask or splits a label word.
        """
        specials = {"cls": tokenizer.cls_token_id, "sep+": tokenizer.sep_token_id, "mask": tokenizer.mask_token_id}
        if None in specials.values():
            raise CannotRun("The mlm head needs a tokenizer with cls, sep and mask tokens; take another model or head.")
        parts: list[list[int] | Slot | None] = []
        for piece in filter(None, template.split("*")):
            if match := SENTENCE.fullmatch(piece):
                parts.append(_slot(*match.groups()))
            elif piece == "mask":
                parts.append(None)
            elif piece in specials:
                parts.append([specials[piece]])
            else:
                parts.append(tokenizer.encode(piece.replace("_", " "), add_special_tokens=False))
        words = tuple(_word(word, tokenizer) for word in label_words)
        return cls(tuple(parts), words, specials["mask"])

    def assemble(self, sentences: list[list[int]]) -> tuple[list[int], int]:
        """(token ids, position of the mask) of one example whose sentences are already short enough."""
        ids: list[int] = []
        position = 0
        for part in self.parts:
            if part is None:
                position = len(ids)
                ids.append(self.mask_id)
            else:
                ids.extend(sentences[part.index] if isinstance(part, Slot) else part)
        return ids, position


def shortened(sentences: list[list[int]], budget: int) -> list[list[int]]:
    """One or two token lists cut to `budget` tokens together, the longer one first."""
    if len(sentences) == 1:
        return [sentences[0][:budget]]
    first, second = map(len, sentences)
    if first + second > budget:
        second = max(budget - first, min(second, budget // 2))
        first = budget - second
    return [sentences[0][:first], sentences[1][:second]]


def _slot(space: str, cut: str, small: str, index: str) -> Slot:
    def rewrite(text: str) -> str:
        # LM-BFF drops the last character blindly; only punctuation is dropped here, so unpunctuated text stays whole
        text = text.rstrip().rstrip(".?!;,:") if cut else text
        text = text[:1].lower() + text[1:] if small else text
        return f"{' ' if space else ''}{text}"

    return Slot(int(index), rewrite)


def _word(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = tokenizer.encode(f" {word}", add_special_tokens=False)  # byte-level tokenizers know " great" as one token
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise CannotRun(f"The label word {word!r} is not one token of this model; use the head mean or native.")
    return ids[0]

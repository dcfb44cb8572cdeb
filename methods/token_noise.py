"""Probes of random tokens: examples of a text task that say nothing (2605.13418, structural token noise)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import CannotRun
from dpft.methods.token_table import token_table

if TYPE_CHECKING:
    import torch
    from torch import nn


def vocabulary(model: nn.Module) -> int:
    """How many tokens there are. Raises CannotRun for a model without a table of them."""
    found = token_table(model)
    if found is None:
        raise CannotRun("The model has no table of tokens to draw from; set probe=public.")
    return found[1].num_embeddings


def draw(
    examples: Sequence[Mapping[str, Any]], size: int, longest: int, words: int, random: torch.Generator
) -> list[dict[str, Any]]:
    """`size` examples of up to `longest` tokens, each between the first and the last token of one of `examples`, with the
    label of another."""
    import torch

    chosen = [examples[int(i)] for i in torch.randint(len(examples), (2 * size,), generator=random)]
    pairs = zip(chosen[::2], chosen[1::2], strict=True)
    return [_noise(one, other["labels"], longest, words, random) for one, other in pairs]


def _noise(example: Mapping[str, Any], label: Any, longest: int, words: int, random: torch.Generator) -> dict[str, Any]:
    """What goes with tokens, one each, is repeated for the new ones."""
    import numpy
    import torch

    ids = numpy.asarray(example["input_ids"])
    length = int(torch.randint(1, max(1, longest - 2) + 1, (), generator=random))
    inner = torch.randint(words, (length,), generator=random).numpy().astype(ids.dtype)
    made = {
        key: numpy.repeat(numpy.asarray(value)[:1], length + 2)
        for key, value in example.items()
        if numpy.ndim(value) == 1 and len(value) == len(ids)
    }
    return {**example, **made, "input_ids": numpy.concatenate([ids[:1], inner, ids[-1:]]), "labels": label}

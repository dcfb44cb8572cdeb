"""Poisson batches from their own generator, and microbatches bucketed by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dpft.harness.errors import BadInput
from dpft.harness.train.noise import KeyStream, stream


class PoissonSampler:
    """Includes each of N examples independently with probability q = expected_batch_size / N, each step.

    The stream depends on (task, seed) only, so methods share batches; the draws are 64-bit, so the q that is used is
    the q that is accounted to 2^-53. A batch may be empty. secret: draw from this instead, which no seed repeats.
    """

    def __init__(
        self,
        num_examples: int,
        expected_batch_size: int,
        task: str,
        seed: int,
        secret: KeyStream | None = None,
    ):
        if expected_batch_size > num_examples:
            raise BadInput(
                f"The batch size {expected_batch_size} is larger than the {num_examples} training examples; choose a smaller one."
            )
        self.num_examples = num_examples
        self.sampling_probability = expected_batch_size / num_examples
        self.generator = stream("cpu", "sampler", task, seed)
        self._secret = secret

    def sample(self) -> list[int]:
        """The indices of the next batch, ascending."""
        if self._secret is not None:
            draws = torch.from_numpy(self._secret.uniform(self.num_examples))
        else:
            draws = torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)
        return (draws < self.sampling_probability).nonzero().flatten().tolist()


def buckets(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split `indices` into microbatches of at most `max_tokens` padded tokens, each of examples of like length.

    The clipped sum does not depend on the order, so sorting by length costs nothing and saves the padding.
    """
    batch: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):  # longest first: the first sets the padded length
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def spread(size: int, count: int) -> list[int]:
    """`count` indices below `size` (all, when there are fewer), evenly spaced."""
    count = min(count, size)
    return [i * size // count for i in range(count)]

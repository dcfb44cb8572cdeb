"""Who is in the batch of a step: samplers, each from its own generator; and microbatches bucketed by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dpft.harness.errors import BadInput
from dpft.harness.privacy.samplings import POISSON, Cyclic, Grouped, Poisson, Truncated
from dpft.harness.train.noise import KeyStream, stream


class Sampler:
    """Draws the batch of one step after the other; this one as Poisson sampling, its subclasses as `sampling` says.

    Each of N examples is in the batch independently, with probability q = expected_batch_size / N. The stream depends on (task,
    seed) only, so methods share batches; the draws are 64-bit, so the q that is used is the q that is accounted to 2^-53. A
    batch may be empty. secret: draw from this instead, which no seed repeats.

    `sampling_probability`: of an example where it may be drawn, as it is booked beside `sampling`.
    """

    def __init__(
        self,
        num_examples: int,
        expected_batch_size: int,
        task: str,
        seed: int,
        secret: KeyStream | None = None,
        sampling: Poisson = POISSON,
    ):
        if expected_batch_size > num_examples:
            raise BadInput(
                f"The batch size {expected_batch_size} is larger than the {num_examples} training examples; choose a smaller one."
            )
        self.num_examples = num_examples
        self.sampling = sampling
        self.sampling_probability = sampling.probability(expected_batch_size / num_examples)
        self.generator = stream("cpu", "sampler", task, seed)
        self._secret = secret

    def sample(self) -> list[int]:
        """The indices of the next batch, ascending."""
        return self._chosen(self._draws()).nonzero().flatten().tolist()

    def eligible(self, step: int) -> torch.Tensor:
        """[N], who may be drawn in a step (from 0): all. A function of public things alone."""
        return torch.ones(self.num_examples, dtype=torch.bool)

    def state(self) -> torch.Tensor:
        """Where it is, for a checkpoint."""
        return self.generator.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)

    def _draws(self) -> torch.Tensor:
        """[N], a uniform number for every example."""
        if self._secret is not None:
            return torch.from_numpy(self._secret.uniform(self.num_examples))
        return torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)

    def _chosen(self, draws: torch.Tensor) -> torch.Tensor:
        """[N], who is in the batch."""
        return draws < self.sampling_probability


class TruncatedSampler(Sampler):
    """Of a Poisson batch above the cap those with the least draws, which are as many at random: given that they are in it, the
    draws of a batch are independent and uniform."""

    def _chosen(self, draws: torch.Tensor) -> torch.Tensor:
        chosen, cap = super()._chosen(draws), self.sampling.truncated_batch_size
        if int(chosen.sum()) > cap:
            least = draws.argsort(stable=True)[:cap]
            chosen = torch.zeros_like(chosen).index_fill_(0, least, True)
        return chosen


class CyclicSampler(Sampler):
    """Only the group whose turn it is, at `groups` times the rate. Groups are those of a public permutation of the examples, a
    function of task and seed, and of sizes that differ by one at most."""

    def __init__(self, num_examples: int, expected_batch_size: int, task: str, seed: int, *rest, **more):
        super().__init__(num_examples, expected_batch_size, task, seed, *rest, **more)
        order = torch.randperm(num_examples, generator=stream("cpu", "groups", task, seed))
        self._group = torch.empty_like(order)
        self._group[order] = torch.arange(num_examples) % self.sampling.groups
        self._drawn = 0

    def eligible(self, step: int) -> torch.Tensor:
        return self._group == step % self.sampling.groups

    def state(self) -> torch.Tensor:
        return torch.cat([super().state(), torch.tensor([*self._drawn.to_bytes(8, "big")], dtype=torch.uint8)])

    def set_state(self, state: torch.Tensor) -> None:
        super().set_state(state[:-8])
        self._drawn = int.from_bytes(bytes(state[-8:].tolist()), "big")

    def _chosen(self, draws: torch.Tensor) -> torch.Tensor:
        turn, self._drawn = self.eligible(self._drawn), self._drawn + 1
        return super()._chosen(draws) & turn


SAMPLERS: dict[type[Poisson], type[Sampler]] = {
    Poisson: Sampler,
    Grouped: Sampler,
    Truncated: TruncatedSampler,
    Cyclic: CyclicSampler,
}


def sampler(
    sampling: Poisson, num_examples: int, expected_batch_size: int, task: str, seed: int, secret: KeyStream | None
) -> Sampler:
    """The sampler of a run's sampling. Raises BadInput for a batch larger than the data."""
    return SAMPLERS[type(sampling)](num_examples, expected_batch_size, task, seed, secret, sampling)


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

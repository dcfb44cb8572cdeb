"""Poisson sampling has the rate and the variance that are accounted; buckets lose and repeat nothing."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dpft.harness.errors import BadInput
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.harness.train.sampling import PoissonSampler, buckets


def test_batch_sizes_are_binomial():
    """Mean Nq and variance Nq(1-q): a shuffled or fixed-size sampler has variance 0."""
    sampler = PoissonSampler(1000, 50, "t", 0)
    sizes = torch.tensor([len(sampler.sample()) for _ in range(4000)], dtype=torch.float64)
    assert abs(float(sizes.mean()) - 50) < 4 * (47.5 / 4000) ** 0.5
    assert abs(float(sizes.var()) / 47.5 - 1) < 4 * (2 / 4000) ** 0.5


def test_examples_are_included_independently():
    sampler = PoissonSampler(20, 5, "t", 1)
    included = torch.zeros(4000, 20, dtype=torch.float64)
    for step in range(4000):
        included[step, sampler.sample()] = 1
    assert (included.mean(0) - 0.25).abs().max() < 4.5 * (0.1875 / 4000) ** 0.5
    off_diagonal = torch.corrcoef(included.T) - torch.eye(20, dtype=torch.float64)
    assert off_diagonal.abs().max() < 4.5 / 4000**0.5


def test_stream_depends_on_task_and_seed_only_and_larger_batches_hold_smaller_ones():
    first, second = PoissonSampler(500, 20, "t", 3), PoissonSampler(500, 60, "t", 3)
    for _ in range(5):
        assert set(first.sample()) <= set(second.sample())
    assert PoissonSampler(500, 20, "t", 4).sample() != PoissonSampler(500, 20, "t", 3).sample()


def test_batch_larger_than_the_data():
    with pytest.raises(BadInput, match="larger than the 10 training examples"):
        PoissonSampler(10, 11, "t", 0)


@hypothesis.given(st.lists(st.integers(1, 40), min_size=0, max_size=60), st.integers(1, 200))
@hypothesis.settings(max_examples=100, deadline=None)
def test_buckets_partition_and_respect_the_token_limit(lengths, max_tokens):
    found = list(buckets(range(len(lengths)), lengths, max_tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert batch and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens)


def test_noise_has_the_declared_variance_and_is_drawn_afresh():
    mechanism = GaussianMechanism(1.5, 0.2, 10, source("cpu", "noise", 0))
    first = mechanism.release({"a": torch.zeros(1_500_000), "b": torch.zeros(10, 7)})
    second = mechanism.release({"a": torch.zeros(1_500_000), "b": torch.zeros(10, 7)})
    a, b = first.tensors["a"].double(), second.tensors["a"].double()
    std = first.mean_noise_std
    assert std == pytest.approx(1.5 * 0.2 / 10)
    assert abs(float(a.var()) / std**2 - 1) < 5 * (2 / 1.5e6) ** 0.5
    assert abs(float(a.mean())) < 5 * std / 1.5e6**0.5
    assert abs(float((a * b).mean()) / std**2) < 5 / 1.5e6**0.5


@pytest.mark.parametrize("noise_multiplier", [0.0, 1e-12])
def test_a_release_is_the_sum_over_the_expected_batch_size(noise_multiplier):
    sums = {"a": torch.arange(100_000.0), "b": torch.ones(3)}
    expected = {name: t / 10 for name, t in sums.items()}
    mechanism = GaussianMechanism(noise_multiplier, 1.0, 10, source("cpu", "noise", 0))
    released = mechanism.release({name: t.clone() for name, t in sums.items()})
    for name, mean in released.mean().items():
        torch.testing.assert_close(mean, expected[name], rtol=0, atol=1e-11)


def test_noise_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        mechanism = GaussianMechanism(1.0, 1.0, 1, source("cpu", "noise", 0))
        found.append(mechanism.release({"a": torch.zeros(300_000), "b": torch.zeros(3)}).tensors["a"])
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    blocks = found[0][:262144].view(8, -1)
    assert (torch.corrcoef(blocks) - torch.eye(8)).abs().max() < 6 / blocks.shape[1] ** 0.5, "streams repeat each other"


def test_a_restored_mechanism_draws_what_it_would_have_drawn():
    one, other = (GaussianMechanism(1.0, 1.0, 1, source("cpu", "noise", 0)) for _ in range(2))
    one.release({"a": torch.zeros(200_000)})
    other.set_state(one.state())
    assert torch.equal(*(m.release({"a": torch.zeros(200_000)}).tensors["a"] for m in (one, other)))

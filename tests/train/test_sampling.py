"""Samplers have the rates and the variance that are accounted; buckets lose and repeat nothing."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dpft.harness.errors import BadInput
from dpft.harness.privacy.samplings import Cyclic, Poisson, Truncated
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import KeyStream, source
from dpft.harness.train.sampling import CyclicSampler, Sampler, TruncatedSampler, buckets, sampler


def test_batch_sizes_are_binomial():
    """Mean Nq and variance Nq(1-q): a shuffled or fixed-size sampler has variance 0."""
    poisson = Sampler(1000, 50, "t", 0)
    sizes = torch.tensor([len(poisson.sample()) for _ in range(4000)], dtype=torch.float64)
    assert abs(float(sizes.mean()) - 50) < 4 * (47.5 / 4000) ** 0.5
    assert abs(float(sizes.var()) / 47.5 - 1) < 4 * (2 / 4000) ** 0.5


def test_examples_are_included_independently():
    poisson = Sampler(20, 5, "t", 1)
    included = torch.zeros(4000, 20, dtype=torch.float64)
    for step in range(4000):
        included[step, poisson.sample()] = 1
    assert (included.mean(0) - 0.25).abs().max() < 4.5 * (0.1875 / 4000) ** 0.5
    off_diagonal = torch.corrcoef(included.T) - torch.eye(20, dtype=torch.float64)
    assert off_diagonal.abs().max() < 4.5 / 4000**0.5


def test_stream_depends_on_task_and_seed_only_and_larger_batches_hold_smaller_ones():
    first, second = Sampler(500, 20, "t", 3), Sampler(500, 60, "t", 3)
    for _ in range(5):
        assert set(first.sample()) <= set(second.sample())
    assert Sampler(500, 20, "t", 4).sample() != Sampler(500, 20, "t", 3).sample()


def test_batch_larger_than_the_data():
    with pytest.raises(BadInput, match="larger than the 10 training examples"):
        Sampler(10, 11, "t", 0)


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


def test_a_truncated_batch_is_a_random_part_of_the_poisson_batch():
    whole, cut = Sampler(40, 20, "t", 0), TruncatedSampler(40, 20, "t", 0, sampling=Truncated(40, 21))
    sizes, kept = [], torch.zeros(4000, 40, dtype=torch.float64)
    for step in range(4000):
        poisson, batch = whole.sample(), cut.sample()
        assert set(batch) <= set(poisson) and len(batch) == min(21, len(poisson)) and batch == sorted(batch)
        sizes.append(len(poisson))
        kept[step, batch] = 1
    assert 0.2 < sum(size > 21 for size in sizes) / 4000 < 0.5
    expected = Truncated(40, 21).least_probability(0.5)
    assert (kept.mean(0) - expected).abs().max() < 4.5 * (0.25 / 4000) ** 0.5


def test_cyclic_groups_take_turns_at_a_rate_of_their_own():
    cyclic = CyclicSampler(60, 10, "t", 0, sampling=Cyclic(4))
    assert cyclic.sampling_probability == pytest.approx(4 * 10 / 60)
    groups = torch.stack([cyclic.eligible(step) for step in range(4)])
    assert groups.sum(1).tolist() == [15] * 4 and (groups.sum(0) == 1).all()
    included = torch.zeros(2000, 60)
    for step in range(2000):
        included[step, cyclic.sample()] = 1
        assert not included[step][~cyclic.eligible(step)].any()
    assert abs(float(included.mean()) - 10 / 60) < 5 * (30_000 * 0.222) ** 0.5 / 120_000
    assert not torch.equal(groups[0], CyclicSampler(60, 10, "t", 1, sampling=Cyclic(4)).eligible(0))


def test_one_group_is_poisson_sampling():
    cyclic, plain = CyclicSampler(60, 10, "t", 0, sampling=Cyclic(1)), Sampler(60, 10, "t", 0)
    assert [cyclic.sample() for _ in range(5)] == [plain.sample() for _ in range(5)]


@pytest.mark.parametrize("sampling", [Poisson(), Truncated(60, 12), Cyclic(4)])
def test_a_restored_sampler_draws_what_it_would_have_drawn(sampling):
    one, other = (sampler(sampling, 60, 10, "t", 0, None) for _ in range(2))
    for _ in range(6):
        one.sample()
    other.set_state(one.state())
    assert [one.sample() for _ in range(6)] == [other.sample() for _ in range(6)]


def test_secret_batches_are_cut_and_take_turns_like_others():
    for sampling in (Truncated(60, 12), Cyclic(4)):
        drawn = sampler(sampling, 60, 10, "t", 0, KeyStream(bytes(32)))
        for step in range(200):
            batch = drawn.sample()
            assert drawn.eligible(step)[batch].all() and len(batch) <= getattr(sampling, "truncated_batch_size", 60)

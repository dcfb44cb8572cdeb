"""Clipping dc-sgd and dp-lac: a one-hot question about norms, where C goes from its answer, and losses on public examples."""

import dataclasses
import math

import pytest
import torch
from rule_cases import SIGMA, B, FakePublic, resolved, run, sampled, seen, started, step
from small_runs import quiet, trained

from dpft.harness.errors import BadInput
from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.query.queries import Gradients
from dpft.methods.clipping.dc_sgd import CANDIDATES


def released(name, values, batch=B):
    return {name: NoisySum({VALUES: torch.tensor(values, dtype=torch.float64)}, 1.0, 1.0, batch)}


def gradient(coordinates=0, multiplier=SIGMA, batch=B):
    return NoisySum({"a": torch.zeros(coordinates - 1), "b": torch.zeros(1, 1)}, multiplier, 1.0, batch)


# --- dc-sgd


def test_the_histogram_is_one_hot_over_equal_bins_and_the_last_has_all_longer_ones():
    rule = started("dc-sgd", clip_norm=3.0, bins=4, histogram_share=0.05)
    asked, more = rule.amend(Gradients())
    assert asked.bound == 3.0 and rule.shares() == {"histogram": 0.05}
    question = more["histogram"]
    assert (question.size, question.bound) == (4, 1.0)
    rows = question.of(seen([[0.0, 0.0], [1.4, 0.0], [0.9, 1.3], [4.6, 0.0], [math.inf, 0.0]], 3.0))  # width 1.5
    assert rows.argmax(1).tolist() == [0, 0, 1, 3, 3] and rows.sum(1).tolist() == [1.0] * 5
    assert question.of(seen(torch.zeros(0, 2), 3.0)).shape == (0, 4)


def test_the_percentile_is_the_middle_of_the_bin_where_the_expected_batch_reaches_it():
    """Of B, not of what was there, and not of the sum of the noisy counts."""
    for shares, expected in (
        ([0.1, 0.3, 0.3, 0.2], 1.5),
        ([0.5, -0.2, 0.0, 0.5], 0.5),
        ([-0.1, 0.1, 0.1, 0.1], 3.5),  # never: half of the batch was missing
        ([0.0, 0.0, 0.0, 0.0], 3.5),
    ):
        rule = started("dc-sgd", clip_norm=2.0, bins=4, chosen_by="percentile", target_quantile=0.4)
        rule.learn(gradient(10), released("histogram", shares))
        assert rule.clip_norm == pytest.approx(expected)


def test_the_error_is_the_noise_in_all_coordinates_and_what_is_cut():
    """Against an independent sum over a grid, and where its derivative vanishes."""
    d, multiplier, shares = 500, 1.3, [0.1, 0.2, 0.3, 0.25, 0.15]
    rule = started("dc-sgd", clip_norm=2.0, bins=5)
    rule.learn(gradient(d, multiplier), released("histogram", shares))
    middles = torch.tensor([0.4, 1.2, 2.0, 2.8, 3.6], dtype=torch.float64)
    grid = 2.0 * torch.tensor(CANDIDATES, dtype=torch.float64)
    cut = (middles - grid[:, None]).clamp_min(0).square() @ torch.tensor(shares, dtype=torch.float64)
    total = d * (multiplier * grid / B) ** 2 + cut
    assert rule.clip_norm == pytest.approx(float(grid[total.argmin()])) and grid[0] < rule.clip_norm < grid[-1]
    again = started("dc-sgd", clip_norm=2.0, bins=5)
    again.learn(gradient(100 * d, multiplier), released("histogram", shares))
    assert again.clip_norm < rule.clip_norm, "more coordinates, more noise, a smaller C"


@pytest.mark.parametrize("clip_norm", [1 / 30, 30.0])
@pytest.mark.parametrize("coordinates", [10_000, 100_000])
def test_the_error_leads_c_to_its_least_from_a_wrong_start(coordinates, clip_norm):
    """The least of the true expected squared error, of norms that the rule never sees."""
    norms = torch.exp(0.5 * torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    grid = torch.logspace(-2, 1, 300, dtype=torch.float64)
    share = 1 - 0.02
    true = [
        coordinates * SIGMA**2 / share * c**2 / B**2 + float((norms - c).clamp_min(0).square().mean()) for c in grid
    ]
    best = float(grid[int(torch.tensor(true).argmin())])
    trace = torch.tensor(run(started("dc-sgd", clip_norm=clip_norm), 1.0, 80, coordinates=coordinates))
    assert trace[40:].log().mean() == pytest.approx(math.log(best), abs=0.2), (trace[40:], best)


def test_the_top_of_the_bins_doubles_and_halves_within_the_range():
    rule = started("dc-sgd", clip_norm=1.0, bins=4, clip_least=0.3, clip_most=5.0)
    assert rule.top == 2
    tops = []
    for shares in ([0, 0, 0, 1.0], [0, 0, 0, 1.0], [0, 0, 0, 1.0], [0, 0.6, 0.3, 0.1]):
        rule.learn(gradient(10), released("histogram", [float(s) for s in shares]))
        tops.append(rule.top)
    assert tops == [4, 8, 10, 10]  # 2 * clip_most
    for _ in range(8):
        rule.learn(gradient(10), released("histogram", [1.0, 0.0, 0.0, 0.0]))
    assert rule.top == pytest.approx(0.6) and rule.clip_norm == pytest.approx(0.3)
    again = started("dc-sgd", clip_norm=1.0, bins=4, clip_least=0.3, clip_most=5.0)
    again.load_state_dict(rule.state_dict())
    assert (again.top, again.clip_norm) == (rule.top, rule.clip_norm)


# --- dp-lac


def test_votes_are_one_hot_over_doubling_bins_and_add_up():
    rule = started("dp-lac", clip_norm=1.0, votes=2, clip_least=0.25, clip_most=4.0, vote_share=0.05)
    assert rule.shares() == {"vote": 0.05}
    question = rule.amend(Gradients())[1]["vote"]
    assert (question.size, question.bound) == (4, 1.0)  # from 1/4, 1/2, 1 and 2
    rows = question.of(seen([[0.0], [0.01], [0.51], [0.99], [1.01], [3.9], [99.0], [math.inf]], 1.0))
    assert rows.argmax(1).tolist() == [0, 0, 1, 1, 2, 3, 3, 3] and rows.sum(1).tolist() == [1.0] * 8
    rule.learn(None, released("vote", [0.1, 0.5, 0.2, 0.3]))
    assert rule.clip_norm == pytest.approx(0.5 * 2**0.5)
    assert rule.amend(Gradients())[0].bound == rule.clip_norm and rule.public.looks == 0
    rule.learn(None, released("vote", [0.1, 0.0, 0.1, 0.4]))  # together 0.2, 0.5, 0.3, 0.7
    assert rule.clip_norm == pytest.approx(2 * 2**0.5)
    assert rule.amend(Gradients())[1] == {} and rule.public.looks == 1


@pytest.mark.parametrize(
    ("follow", "expected"),
    [("falls", [1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]), ("loss", [1, 1 / 2, 0.6, 0.4, 0.4, 0.4])],
)
def test_c_follows_the_ratio_of_public_losses(follow, expected):
    public = FakePublic([2.0, 1.0, 1.2, 0.8, -0.5, 0.7])  # a loss below 0 says nothing, nor does the next after it
    rule = started("dp-lac", public=public, clip_norm=1.0, votes=1, follow=follow)
    rule.amend(Gradients())
    rule.learn(None, released("vote", [float(j == 9) for j in range(20)]))
    start = rule.clip_norm
    for times in expected:
        asked, more = rule.amend(Gradients())
        assert asked.bound == rule.clip_norm == pytest.approx(start * times) and not more
        rule.learn(None, {})


def test_one_vote_beside_little_noise_is_enough_and_five_beside_much():
    """Batches of 64 at sigma 2: the noise in each bin is 20 votes."""
    for seed in range(5):
        torch.manual_seed(seed)
        rule = started("dp-lac", 2.0, batch_size=64, clip_norm=30.0)
        for _ in range(5):
            step(rule, sampled(1.0, torch.Generator().manual_seed(seed))[:64], 2.0, 64)
        assert 0.4 < rule.clip_norm < 2.5


def test_the_state_goes_with_votes_and_loss():
    rule, again = (started("dp-lac", public=FakePublic([3.0, 2.0]), votes=1, clip_norm=2.0) for _ in range(2))
    torch.manual_seed(0)
    step(rule, torch.ones(B, 1))
    rule.amend(Gradients())
    again.load_state_dict(rule.state_dict())
    assert (again.clip_norm, again.taken, again.loss, again.votes) == (rule.clip_norm, 1, 3.0, rule.votes)
    again.public.looks = 1
    assert again.amend(Gradients())[0].bound == rule.amend(Gradients())[0].bound == pytest.approx(2 / 3 * 2e-3 * 2**8.5)


@pytest.mark.parametrize("engine", ["factored", "opacus"])
def test_in_a_run_c_follows_the_loss_of_public_examples_at_the_weights_of_the_step(setup_of, engine):
    """Not of the step before, not with dropout, and no private example is looked at."""
    from dpft.harness.engine import engine_class

    setup = setup_of("dp-adam", clipping="dp-lac", votes=1, loss_examples=8, follow="loss", lr=1e-2)
    own = engine_class(engine)(setup.prepared.model, setup.engine.loss, setup.parameters, setup.clock)
    setup, rule, losses = dataclasses.replace(setup, engine=own), setup.method.rule, []
    trains, batch = setup.method.step, rule.public.batch(8)

    def step(ask, number):
        modes = [m.training for m in setup.prepared.model.modules()]
        setup.prepared.model.eval()
        with torch.no_grad(), own.plain():
            losses.append(float(rule.public.loss(setup.prepared.model, batch).double().mean()))
        setup.prepared.model.train()
        state = torch.get_rng_state()
        update = trains(ask, number)
        assert modes == [m.training for m in setup.prepared.model.modules()] and any(modes)
        assert torch.equal(state, torch.get_rng_state()), "a look at public examples must not use up randomness"
        return update

    setup.method.step = step
    made = trained(setup, quiet)
    own.close()
    bounds = [row["clip_norm"] for row in made.progress.curve]
    assert len({*losses}) == 4 and len({*bounds}) == 4
    assert bounds[2] / bounds[1] == pytest.approx(losses[2] / losses[1])
    assert bounds[3] / bounds[2] == pytest.approx(losses[3] / losses[2])


def test_bad_choices_are_one_sentence():
    for more, message in (
        ({"clipping": "dp-lac", "task": "rte"}, "dp-lac learns from public data, and the task rte has none"),
        ({"clipping": "dp-lac", "votes": 0}, "votes must be between 1 and"),
        ({"clipping": "dp-lac", "clip_rate": 0.2}, "no setting of dp-adam, clipping dp-lac called 'clip_rate'"),
        ({"clipping": "dc-sgd", "chosen_by": "errors"}, "did you mean 'error'"),
        ({"clipping": "dc-sgd", "bins": 1}, "bins must be between 2 and"),
        ({"clipping": "dc-sgd", "mechanism": "plrv"}, "certified for Gaussian noise alone"),
    ):
        with pytest.raises(BadInput, match=message):
            resolved(**more)

"""The statistics of an audit: valid where nothing is wrong, sharp where something is, and bounds that cover."""

import dataclasses
import math
import types

import numpy
import pytest
import torch
from scipy import stats

from dpft.harness.audit import batch_checks, bounds, noise_checks, noise_notes
from dpft.harness.audit.alarms import LEVEL, alarms
from dpft.harness.audit.all_checks import run_checks
from dpft.harness.audit.directions import factors
from dpft.harness.audit.noise_notes import Notes, _close
from dpft.harness.audit.observe import Observation
from dpft.harness.audit.subject import Question
from dpft.harness.engine import clipping as clipping_of
from dpft.harness.engine.clipping import Clipping
from dpft.harness.privacy.samplings import POISSON, Cyclic, Truncated

SIZES = {("gradient", "a"): 30, ("gradient", "b"): 200, ("gradient", "c"): 170, ("count", "values"): 1}


def noted(rng, steps=40, change=lambda entries: entries):
    notes = Notes()
    for _ in range(steps):
        entries = change(torch.from_numpy(rng.standard_normal(sum(SIZES.values())).astype("float32")))
        notes.add(SIZES, entries, torch.from_numpy(rng.random(len(entries)) < 0.8))
    return notes.collected()


def simulated(rng, steps=40, canaries=32, q=0.25, sigma=2.0, noise=None):
    """What an audit would see of a correct run, drawn directly."""
    times = (rng.random((steps, canaries)) < q).astype(int)
    times[steps // 2] = 0
    norms = numpy.where(numpy.arange(canaries) % 4 == 1, 0.5, 100.0) * numpy.ones((steps, 1))
    length, member, far = norms.clip(max=1), times > 0, norms >= 20
    return Observation(
        spec=Question("dp-sgd", steps=steps, canaries=canaries, sampling_rate=q).spec(),
        privacy=None,
        phases=numpy.zeros(steps, dtype=int),
        empty=steps // 2,
        times=times,
        strangers=None,
        batches=steps,
        releases=steps,
        names={},
        declared=[],
        events=[],
        places=numpy.array([i % 4 if i % 4 == 3 else -1 for i in range(canaries)]),
        seen=member * length**2 + sigma * length * rng.standard_normal((steps, canaries)),
        expected=length**2,
        norms=norms,
        spread=numpy.stack([(group * length**2).sum(1) for group in (member & far, member & ~far, ~member)], 1),
        sampling_probability=q,
        noise_multiplier=numpy.full(steps, sigma),
        noise=noise or noted(rng, steps),
        eligible=numpy.ones((steps, canaries), dtype=bool),
    )


def redrawn(rng, shared=0.0):
    """What a replay under another key would note of a count and of a parameter; shared: of the draws are those of the run."""
    found = {}
    for number, part in ((24, ("count", "values")), (4000, ("gradient", "b"))):
        one, other = rng.standard_normal((2, number))
        other = shared * one + (1 - shared**2) ** 0.5 * other
        found[part] = numpy.array([(one * other).sum(), (one**2).sum(), (other**2).sum(), number])
    return found


def test_noise_that_another_key_does_not_change_is_seen():
    rng = numpy.random.default_rng(11)
    assert noise_checks._another_key(redrawn(rng, shared=0.9)).p_value < 1e-6
    same = {("count", "values"): numpy.array([24.0, 24.0, 24.0, 24])}
    assert noise_checks._another_key(same).p_value < 1e-6


def test_the_noise_of_one_number_is_not_drowned_by_that_of_a_gradient():
    rng = numpy.random.default_rng(12)

    def bare(entries):
        entries[-1] *= 0.3
        return entries

    found = noise_checks._size(simulated(rng, noise=noted(rng, change=bare)))
    assert found.p_value < 1e-6 and found.observed == pytest.approx(0.3, abs=0.15)


def test_numbers_that_repeat_from_step_to_step_are_seen():
    rng = numpy.random.default_rng(13)

    def stuck(entries):
        entries[-1] = 0.7
        return entries

    assert noise_checks._between_steps(simulated(rng, noise=noted(rng, change=stuck))).p_value < 1e-6


def test_a_parameter_of_many_sizes_is_kept_with_few_picks():
    notes, rng = Notes(), numpy.random.default_rng(14)
    for size in range(600, 620):
        entries = torch.from_numpy(rng.standard_normal(size).astype("float32"))
        notes.add({("gradient", "table"): size}, entries, torch.ones(size, dtype=torch.bool))
    found = notes.collected()
    assert len(found.columns) == noise_notes.SIZES + 1 and found.kept.shape == (20, 512 * (noise_notes.SIZES + 1))
    assert found.quiet.sum() == 20 * 512, "every step keeps as many as there are picks"


def test_false_alarms_stay_under_the_stated_level():
    """300 correct runs: at most LEVEL alarm (within what chance allows), and no p-value is small too often."""
    rng = numpy.random.default_rng(7)
    found = [run_checks(simulated(rng), redrawn(rng)) for _ in range(300)]
    accused = sum(bool(alarms(one)) for one in found)
    assert stats.binom.sf(accused - 1, len(found), LEVEL) > 1e-3, accused
    for number, check in enumerate(found[0]):
        low = sum(one[number].p_value < 0.05 for one in found)
        assert stats.binom.sf(low - 1, len(found), 0.05) > 1e-4, (check.name, low)


def drawn(member, turn=None, sampling=POISSON, q=0.25):
    """An observation of these batches, [T, n]; turn: who may be in them; q: as booked."""
    seen = simulated(numpy.random.default_rng(0), *member.shape, noise="none")
    turn = numpy.ones_like(member) if turn is None else turn
    privacy = types.SimpleNamespace(sampling=sampling)
    return dataclasses.replace(
        seen, times=member.astype(int), eligible=turn, empty=None, privacy=privacy, sampling_probability=q
    )


def _taking_turns(steps, canaries, groups):
    return numpy.arange(canaries) % groups == numpy.arange(steps)[:, None] % groups


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_that_take_turns_are_known_from_coins_and_coins_from_them(groups):
    """What is booked is never accused, under the sampling that it is booked as; under another it is at once."""
    rng, turn, q = numpy.random.default_rng(groups), _taking_turns(60, 64, groups), groups * 0.125
    honest = [
        batch_checks._batches(drawn((rng.random((60, 64)) < q) & turn, turn, Cyclic(groups), q)) for _ in range(300)
    ]
    for number in (0, 1):
        assert stats.binom.sf(sum(one[number].p_value < 0.01 for one in honest) - 1, 300, 0.01) > 1e-4
    as_poisson = batch_checks._batches(drawn((rng.random((60, 64)) < q) & turn, q=0.125))
    assert (as_poisson[1].p_value < 1e-6) == (groups > 1)
    if groups > 1:
        coins = batch_checks._batches(drawn(rng.random((60, 64)) < 0.125, turn, Cyclic(groups), q))
        assert coins[0].p_value == 0.0


def test_cut_batches_are_not_accused_and_whole_ones_are():
    rng, cut = numpy.random.default_rng(3), Truncated(64, 9)
    member = [rng.random((60, 64)) < 0.125 for _ in range(60)]
    kept = [one.copy() for one in member]
    for one in kept:
        for row in one:
            inside = rng.permutation(numpy.flatnonzero(row))
            row[inside[9:]] = False
    found = [batch_checks._batches(drawn(one, sampling=cut, q=0.125)) for one in kept]
    for number in (0, 1):
        assert stats.binom.sf(sum(one[number].p_value < 0.02 for one in found) - 1, 60, 0.02) > 1e-4
    assert batch_checks._batches(drawn(member[0], sampling=cut, q=0.125))[1].p_value == 0.0


@pytest.mark.parametrize("steps", [2, 5, 19])
def test_few_batches_are_not_called_regular(steps):
    """Batch sizes of a few steps are equal by chance too often for a smooth law of their spread."""
    rng = numpy.random.default_rng(steps)
    found = [batch_checks._batches(drawn(rng.random((steps, 24)) < 0.25))[1].p_value for _ in range(400)]
    assert stats.binom.sf(sum(p < 1e-3 for p in found) - 1, 400, 1e-3) > 1e-4


@pytest.mark.parametrize("at, entries, seen", [(3.0, 3_600, True), (4.0, 150_000, True), (4.0, 15_000, False)])
def test_a_cut_tail_is_seen_with_as_many_entries_as_is_said(at, entries, seen):
    rng = numpy.random.default_rng(5)
    steps = entries // 320
    one = simulated(rng, steps, noise=noted(rng, steps, lambda z: z.clamp(-at, at)))
    assert (noise_checks._extremes(one).p_value < LEVEL / 13) == seen


def test_a_tail_too_far_out_is_seen():
    rng = numpy.random.default_rng(6)

    def spoilt(entries):
        entries[50] *= 4
        return entries

    assert noise_checks._extremes(simulated(rng, noise=noted(rng, change=spoilt))).p_value < 1e-4


@pytest.mark.parametrize("check", [noise_checks._between_parameters, noise_checks._coincidences])
def test_noise_of_one_parameter_in_another_is_seen(check):
    """30 of 400 entries are drawn twice."""

    def spoilt(entries):
        entries[230:260] = entries[:30]
        return entries

    rng = numpy.random.default_rng(8)
    assert check(simulated(rng, noise=noted(rng, change=spoilt))).p_value < 1e-6


def test_noise_that_moves_within_the_release_is_seen_by_coincidence_alone():
    """The same draws, elsewhere and with the other sign: no correlation finds them."""

    def spoilt(entries):
        entries[300:330] = -entries[torch.randperm(30)]
        return entries

    rng = numpy.random.default_rng(9)
    one = simulated(rng, noise=noted(rng, change=spoilt))
    assert noise_checks._coincidences(one).p_value < 1e-6


@pytest.mark.parametrize("n", [200, 5000])
def test_close_pairs_are_as_many_as_expected(n):
    """Mean and variance of their number, over 300 draws of n entries."""
    rng = numpy.random.default_rng(10)
    found, expected, variance = numpy.array([_close(numpy.abs(rng.standard_normal(n))) for _ in range(300)]).T
    assert abs(found.mean() - expected[0]) < 4 * (variance[0] / 300) ** 0.5
    assert 0.75 < found.var() / variance[0] < 1.3


@pytest.mark.parametrize("clipping", ["abadi", "auto-s", "psac"])
@pytest.mark.parametrize("groups", ["flat", "layer"])
def test_the_published_factors_are_those_of_a_correct_engine(clipping, groups):
    """Written down twice, on purpose: the audit's own must not come from the code that it audits."""
    squares = {name: torch.rand(50, dtype=torch.float64) * 9 for name in ("x.weight", "x.bias", "y.weight")}
    rule = Clipping(clipping, groups)
    parts = rule.grouped(squares)
    for bound in (1.3, {group: 0.5 + number for number, group in enumerate(parts)}):
        found, lengths, ball = factors(rule, bound, squares)
        assert ball == pytest.approx(clipping_of.ball(bound, tuple(parts)))
        for number, (group, own) in enumerate(clipping_of.divided(bound, tuple(parts)).items()):
            norms, expected = rule.of_group(torch.stack([squares[name] for name in parts[group]]), *own)
            torch.testing.assert_close(lengths[:, number], norms)
            for name in parts[group]:
                torch.testing.assert_close(found[name], expected)


def test_the_bound_covers_and_tightens():
    """On simulated runs: at most 5% above the truth, and closer to it with more steps' worth of data."""
    rng = numpy.random.default_rng(8)
    once = noted(rng)
    limits = []
    for _ in range(400):
        one = simulated(rng, noise=once)
        chosen = one.far & one.sampled[:, None]
        limits.append(bounds._effective(one.seen[chosen & one.member], one.seen[chosen & ~one.member], 0.025))
    assert stats.binom.sf(sum(limit < 2.0 for limit in limits) - 1, 400, 0.05) > 1e-3
    few, many = (bounds.reachable(60, 1e-5, 4.0, 0.25, 3.0, 60 * n, 1).epsilon for n in (32, 3200))
    exact = bounds._composed(0.25, 3.0, 60, 1e-5, 4.0, -1).epsilon
    assert few < many < exact < 1.15 * many


def test_a_noise_too_small_for_the_accountant_is_capped_and_not_an_error():
    found = bounds._composed(0.125, 0.01, 20, 1e-5, 4.0, -1)
    assert found.capped and 8 < found.epsilon <= 20
    assert bounds._composed(0.125, math.inf, 200, 1e-5, 4.0, -1).epsilon == 0

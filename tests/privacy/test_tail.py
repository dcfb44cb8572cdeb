"""The tail of the noise: it is there, what is missing of it is charged, and what old streams lack is known."""

import json
import math
import random

import numpy
import pytest
import torch
from scipy import stats
from studies import loose

from dpft.harness.privacy import Ledger, Release, certify
from dpft.harness.privacy.calibration import Noise, Wanted, fit
from dpft.harness.privacy.tail import LEGACY_REACH, REACH, _worst, checked, missing, shortfall
from dpft.harness.train import noise
from dpft.harness.train.mechanism import GaussianMechanism

OFFICIAL = loose("official")


def events(sigma, q, steps):
    ledger = Ledger()
    ledger.append(0, q, [Release(name="gradient", noise_multiplier=sigma)])
    return [{**ledger.events[0], "step_to": steps}]


def source(*key):
    """The noise of a run on this machine, at this commit."""
    return noise.source("cpu", *key)


@pytest.mark.slow
def test_noise_goes_on_where_fp32_draws_end():
    """Of 2^29 Gaussian draws 4.3 are expected beyond 5.768; fp32 draws of 24 bits make none, however many there are."""
    mechanism = GaussianMechanism(1.0, 1.0, 1, source("tail", 0))
    largest = 0.0
    for _ in range(2**6):
        release = mechanism.release({"a": torch.zeros(2**23)}).tensors["a"]
        largest = max(largest, float(release.max()), -float(release.min()))
    assert largest > 5.768


def test_extremes_are_those_of_a_gaussian():
    """Counts beyond each of many edges, and of squared radii of the pairs that are drawn together."""
    size = 40 * noise.PIECE
    draws = GaussianMechanism(1.0, 1.0, 1, source("extremes", 1)).release({"a": torch.zeros(size)}).tensors["a"]
    values = draws.double().numpy()
    for edge in (0.5, 2.0, 3.0, 3.5, 3.8, 4.0, 4.2, 4.5):
        expected = size * 2 * stats.norm.sf(edge)
        assert stats.poisson.interval(1 - 1e-5, expected)[0] <= (numpy.abs(values) > edge).sum()
        assert (numpy.abs(values) > edge).sum() <= stats.poisson.interval(1 - 1e-5, expected)[1]
    pairs = values.reshape(-1, 2, noise.PIECE // 2)
    squares = (pairs**2).sum(1).ravel()
    for edge in (13.0, 13.8, 14.0, 16.0, 18.0):  # 13.86 is where the radius is drawn again
        expected = len(squares) * math.exp(-edge / 2)
        low, high = stats.poisson.interval(1 - 1e-5, expected)
        assert low <= (squares > edge).sum() <= high
    assert stats.kstest(values[:1_000_000], "norm").pvalue > 1e-4


class Rigged:
    """A cipher whose bits are the rarest: the smallest u twice over."""

    def update_into(self, data, buffer):
        words = numpy.frombuffer(buffer, dtype=numpy.uint32, count=len(data) // 4)
        words[: len(words) // 2], words[len(words) // 2 :] = 0x80000000, 0x7FFFFFFF  # angle 0 comes from the middle
        words[len(words) // 2 :] = 0

    def update(self, data):
        return bytes(len(data))


def test_the_largest_draw_is_what_the_accounting_takes_for_the_reach(monkeypatch):
    monkeypatch.setattr(noise, "_cipher", lambda key, number: Rigged())
    scratch = noise.Scratch(bytes(32))
    largest = float(scratch.draw("gaussian", 0, 64).max())
    assert REACH["gaussian"] <= largest == pytest.approx(math.sqrt(2 * 64 * math.log(2)), rel=1e-6)
    assert REACH["gaussian"] >= 8.5


def test_a_gpus_stream_is_gaussian_and_laplace_too():
    """The same code on a CPU's generator: no GPU is needed to run it."""
    stream = noise.DeviceStream(noise.stream("cpu", "device"))
    for kind, law in (("gaussian", "norm"), ("laplace", "laplace")):
        parts = [torch.zeros(300_001), torch.zeros(7, 11), torch.zeros(0)]
        stream.add(parts, 3.0, 3.0, kind)
        assert stats.kstest(torch.cat([p.flatten() for p in parts]).double().numpy(), law).pvalue > 1e-4
    state = stream.state()
    again = [torch.zeros(100), torch.zeros(100)]
    stream.add(again[:1], 1.0, 1.0, "gaussian")
    stream.set_state(state)
    stream.add(again[1:], 1.0, 1.0, "gaussian")
    assert torch.equal(*again)


def test_laplace_noise_has_its_tail():
    draws = torch.zeros(2_000_000)
    source("laplace", 0).add([draws], 1.0, 1.0, "laplace")
    assert stats.kstest(draws.double().numpy()[:500_000], "laplace").pvalue > 1e-4
    assert (draws.abs() > 10).sum() == pytest.approx(2e6 * math.exp(-10), abs=5 * math.sqrt(2e6 * math.exp(-10)))


def test_pieces_do_not_repeat_and_do_not_depend_on_threads_or_on_how_tensors_are_cut():
    whole, cut = torch.zeros(300_000), [torch.zeros(n) for n in (1, 70_000, 129_999, 100_000)]
    source("pieces").add([whole], 1.0, 1.0, "gaussian")
    source("pieces").add(cut, 1.0, 1.0, "gaussian")
    assert torch.equal(whole, torch.cat(cut))
    blocks = whole[: 4 * noise.PIECE].view(8, -1)
    assert (torch.corrcoef(blocks) - torch.eye(8)).abs().max() < 6 / blocks.shape[1] ** 0.5


def test_one_bit_of_the_key_changes_all_noise_and_secret_keys_have_256():
    keys = [bytes(32), bytes([*bytes(31), 1]), bytes([1, *bytes(31)]), bytes([*bytes(15), 128, *bytes(16)])]
    draws = []
    for key in keys:
        draws.append(torch.zeros(1000))
        noise.KeyStream(key).add([draws[-1]], 1.0, 1.0, "gaussian")
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(4)).abs().max() < 0.2
    with pytest.raises(ValueError, match="32 bytes"):
        noise.KeyStream(bytes(8))
    assert noise.secret_source()._key != noise.secret_source()._key


def test_fp32_draws_cost_a_run_at_epsilon_8_more_than_its_delta_at_any_epsilon():
    """The demo's budget: 3.9 times delta for an example that moves one coordinate, more where it moves many."""
    demo = events(0.40614, 256 / 18348, 16)
    alone = shortfall(demo, LEGACY_REACH["cpu"], None)
    assert alone / 2.725e-5 == pytest.approx(3.88, abs=0.05)
    assert shortfall(demo, LEGACY_REACH["cpu"], 22_600_000) >= alone
    weak = events(0.7355, 512 / 67349, 30)  # much noise: an example that moves all coordinates a little shows more
    assert shortfall(weak, LEGACY_REACH["cpu"], 150_000) > 2 * shortfall(weak, LEGACY_REACH["cpu"], None)


def test_shortfall_is_what_an_attacker_sees():
    """Noise that ends at 2.5: how often does a run of 5 steps with q = .2 end up where it cannot be without the example?"""
    rng, runs, steps, q, sigma, reach = numpy.random.default_rng(0), 40_000, 5, 0.2, 1.0, 2.5
    draws = stats.truncnorm.rvs(-reach, reach, size=(runs, steps), random_state=rng)
    beyond = (draws + (rng.random((runs, steps)) < q) / sigma > reach).any(1).mean()
    known = shortfall(events(sigma, q, steps), reach, None)
    assert beyond == pytest.approx(known, rel=0.1)


def test_no_direction_costs_more_than_is_charged():
    rng = random.Random(0)
    for _ in range(300):
        sigma, d = rng.uniform(0.3, 5), rng.choice([1, 2, 5, 50, 1000])
        weights = numpy.array([rng.random() ** rng.choice([0.2, 1, 8]) for _ in range(d)]) + 1e-12
        shifts = numpy.sqrt(weights / weights.sum()) / sigma
        reach = REACH["gaussian"]
        exact = float((stats.norm.sf(reach - shifts) - stats.norm.sf(reach)).sum())
        assert exact <= _worst({"mechanism": "gaussian", "noise_multiplier": sigma}, 10**11) * (1 + 1e-9)


@pytest.mark.parametrize(
    "mechanism, shape", [("gaussian", "spherical"), ("laplace", "coordinates"), ("laplace", "spherical")]
)
def test_the_budget_holds_at_the_delta_that_the_tail_leaves(mechanism, shape):
    wanted = Wanted(3.0, 1e-5, 0.02, 20, noise_stream=2)
    found = fit(wanted, mechanism, shape, None, 770)
    ledger = Ledger()
    ledger.append(0, 0.02, [found.entry("gradient")])
    booked = [{**ledger.events[0], "step_to": 20}]
    certificate = certify(booked, 1e-5, 3.0, 2)
    assert certificate["within_budget"] and 0 < certificate["tail_delta"] < 1e-5 / 100
    assert checked(booked, 1e-5, 2) == 1e-5 - certificate["tail_delta"] and missing(booked, 1e-5, 1) == 0
    assert wanted.delta_for(found) == checked(booked, 1e-5, 2)


def test_a_tail_that_ends_early_would_be_charged(monkeypatch):
    """The arithmetic bites: at the reach of fp32 draws the same noise is outside its budget."""
    found = fit(Wanted(8.0, 1e-5, 0.02, 20, noise_stream=2), "gaussian", "spherical", None, None)
    booked = events(found.noise_multiplier, 0.02, 20)
    assert certify(booked, 1e-5, 8.0, 2)["within_budget"]
    monkeypatch.setitem(REACH, "gaussian", LEGACY_REACH["cpu"])
    late = certify(booked, 1e-5, 8.0, 2)
    assert not late["within_budget"] and late["tail_delta"] > 1e-5


def test_libraries_are_named_with_where_their_draws_end():
    from click.testing import CliRunner

    from dpft.harness.bench import draws
    from dpft.harness.cli import cli

    found = {way.name: way for way in (*draws.libraries(), *draws.candidates())}
    for way in found.values():
        values = way.fill()
        assert values.shape == (draws.SIZE,) and stats.kstest(values.double().numpy(), "norm").pvalue > 1e-5, way.name
        assert draws.largest(way, 300_000) < way.reach
    assert found["torch, CPU, fp32"].reach < 5.77 < 8.5 < found["dpft, CPU"].reach
    asked = ["noise", "--tail", "--epsilon", "8", "--draws", "70000", "--json"]
    rows = json.loads(CliRunner().invoke(cli, asked, standalone_mode=False).stdout)
    lost = {row["library"]: row["δ lost / δ, ε = 8"] for row in rows}
    assert lost["torch, CPU, fp32"] > 1 > 1e-6 > lost["dpft, CPU"]


def test_ways_to_draw_are_compared_in_one_run():
    from dpft.harness.bench import draws

    rows = draws.compare(1)
    assert rows[0]["time"] == 1.0 and "dpft, CPU" in draws.markdown(rows)


def test_old_records_keep_their_ids_and_their_streams():
    from dpft.harness.runs.resolve import resolve
    from dpft.harness.runs.spec import RunSpec, completed

    for path in OFFICIAL.glob("*.json"):
        spec = RunSpec(**completed(json.loads(path.read_text())["spec"]))
        assert spec.run_id == path.stem
    assert resolve({"task": "low-rank", "method": "dp-sgd"}).noise_stream == 2
    assert resolve({"task": "low-rank", "method": "non-private"}).noise_stream == 1
    from dpft.harness.errors import BadInput

    with pytest.raises(BadInput, match="noise_stream"):
        resolve({"task": "low-rank", "method": "dp-sgd", "noise_stream": 1})


def test_a_gaussian_needs_hardly_more_noise_for_its_tail():
    old = fit(Wanted(8.0, 1e-5, 0.02, 20), "gaussian", "spherical", None, None)
    new = fit(Wanted(8.0, 1e-5, 0.02, 20, noise_stream=2), "gaussian", "spherical", None, None)
    assert isinstance(new, Noise) and new.noise_multiplier == pytest.approx(old.noise_multiplier, rel=1e-3)

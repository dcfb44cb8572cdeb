"""Noise that is correlated over steps has the covariance of its strategy, and goes on after a resume as if nothing had been."""

import dataclasses
import json

import numpy
import pytest
import torch
from small_runs import a_spec, quiet, stopped, trained, unevaluated, weights

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import certify
from dpft.harness.privacy.strategy import coefficients, deviation, inverse, prefix_deviation
from dpft.harness.query.encoding import Encoding
from dpft.harness.query.queries import Gradients
from dpft.harness.records.verifying import verify_run
from dpft.harness.runs import registry
from dpft.harness.train import run
from dpft.harness.train.correlated import Correlated
from dpft.harness.train.mechanism import GaussianMechanism, Mechanism
from dpft.harness.train.noise import source

STEPS = 12
CYCLIC = {"sampler": "cyclic", "batch_size": 20}


def strategy(bands, steps=STEPS):
    """C, [steps, steps]."""
    c = coefficients(bands)
    return sum(numpy.diag(numpy.full(steps - k, c[k]), -k) for k in range(min(bands, steps)))


@pytest.mark.parametrize("bands", [1, 2, 3, 8])
def test_the_strategy_is_banded_normalised_and_inverted(bands):
    matrix = strategy(bands)
    lengths = numpy.linalg.norm(matrix, axis=0)
    assert lengths.max() <= 1 + 1e-12 and lengths[0] == pytest.approx(1.0)
    inverted = numpy.linalg.inv(matrix)
    assert inverted[:, 0] == pytest.approx(inverse(bands, STEPS))
    assert [deviation(bands, t) for t in range(STEPS)] == pytest.approx(numpy.linalg.norm(inverted, axis=1))
    prefixes = numpy.tril(numpy.ones((STEPS, STEPS))) @ inverted
    assert prefix_deviation(bands, STEPS) == pytest.approx(numpy.sqrt((prefixes**2).sum(1).mean()))


def test_its_square_is_the_matrix_of_prefix_sums_where_it_has_all_bands():
    root = strategy(STEPS) / coefficients(STEPS)[0]
    assert root @ root == pytest.approx(numpy.tril(numpy.ones((STEPS, STEPS))))


@pytest.mark.parametrize("bands", [2, 4])
def test_releases_have_the_covariance_of_the_strategy(bands):
    """Over 40,000 coordinates; and C w is white, which independent noise is not, nor that of another strategy."""
    mechanism = Mechanism(
        GaussianMechanism(1.5, 0.2, 10, source("cpu", 0)).noise, 0.2, 10, source("cpu", "n", 0), bands
    )
    made = [mechanism.release({"a": torch.zeros(30_000), "b": torch.zeros(100, 100)}) for _ in range(STEPS)]
    unit = 1.5 * 0.2 / 10
    for step, noisy in enumerate(made):
        assert noisy.mean_noise_std == pytest.approx(unit * deviation(bands, step))
    noise = numpy.stack([torch.cat([t.flatten() for t in noisy.tensors.values()]).double() for noisy in made]) / unit
    inverted = numpy.linalg.inv(strategy(bands))
    within = 6 * numpy.abs(inverted).max() ** 2 * STEPS**0.5 / 40_000**0.5
    assert numpy.abs(noise @ noise.T / 40_000 - inverted @ inverted.T).max() < within
    white = strategy(bands) @ noise
    assert numpy.abs(white @ white.T / 40_000 - numpy.eye(STEPS)).max() < 6 * (2 / 40_000) ** 0.5
    assert numpy.abs(noise @ noise.T / 40_000 - numpy.eye(STEPS)).max() > 0.2


def test_one_band_is_independent_noise_bit_for_bit():
    plain, banded = (
        Mechanism(GaussianMechanism(1.0, 1.0, 1, source("cpu", 0)).noise, 1.0, 1, source("cpu", "n"), bands)
        for bands in (1, 1)
    )
    assert not banded.kept()
    assert torch.equal(*(m.release({"a": torch.zeros(1000)}).tensors["a"] for m in (plain, banded)))


def test_steps_of_other_shapes_spaces_or_without_a_question_are_refused():
    noise = Correlated(source("cpu", "n"), 3)
    noise.add([torch.zeros(4)], 1.0, 1.0, "gaussian")
    with pytest.raises(CannotRun, match="other shapes than the one before"):
        noise.add([torch.zeros(5)], 1.0, 1.0, "gaussian")
    side = torch.eye(3)
    noise.same_space("It", {"gradient": Gradients(encodings={"w": Encoding(left=side.clone())})})
    noise.same_space("It", {"gradient": Gradients(encodings={"w": Encoding(left=side.clone())}, loss=lambda f: f)})
    for other in (
        Gradients(),
        Gradients(encodings={"w": Encoding(left=-side)}),
        Gradients(encodings={"w": Encoding(left=side)}, bound=2.0),
        Gradients(encodings={"w": Encoding(left=side)}, only=frozenset({"w"})),
    ):
        with pytest.raises(CannotRun, match="another space than in its first step"):
            noise.same_space("It", {"gradient": other})


@pytest.mark.parametrize(
    "method, more, reason",
    [
        ("dp-grape", {}, "in a space that changes from step to step"),
        ("sparta", {}, "several kinds of steps"),
        ("dp-zo", {}, "asks for numbers"),
        ("rmt", {}, "decoder rmt takes the noise of steps for independent"),
        ("dp-adam", {"clipping": "slaclip"}, "clipping slaclip moves the bound"),
        ("dp-adam", {"bands": 5}, "there are only 4 steps"),
        ("dp-adam", {"mechanism": "laplace"}, "Gaussian noise only"),
        ("dp-adam", {"sampler": "poisson"}, "set sampler=cyclic, or leave it out"),
        ("dp-adam", {"sampler": "cyclicc"}, "cyclic"),
        ("dp-adam", {"bands": 1, "truncated_batch_size": 1}, "set sampler=truncated, or leave it out"),
    ],
)
def test_what_noise_cannot_be_correlated_for_is_refused(method, more, reason, tiny_bert):
    with pytest.raises(BadInput, match=reason):
        a_spec(method, tiny_bert, **{**CYCLIC, "bands": 2, **more})


def test_a_method_that_says_it_asks_in_one_space_and_does_not_ends_its_run(setup_of, monkeypatch):
    monkeypatch.setattr(registry.method("dp-grape"), "one_space", True)
    with pytest.raises(CannotRun, match="another space than in its first step"):
        trained(setup_of("dp-grape", **CYCLIC, bands=2, refresh=2), watched=False)


def test_secure_noise_is_refused(tiny_bert, settings):
    record, _ = run.execute(
        a_spec("dp-adam", tiny_bert, **CYCLIC, bands=2), dataclasses.replace(settings, secure_noise=True), quiet
    )
    assert record["status"] == "error" and "leave out --secure-noise, or bands" in record["error"]


@pytest.mark.parametrize(
    "more", [{"sampler": "truncated", "truncated_batch_size": 22}, {"sampler": "cyclic", "bands": 3}]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(more, setup_of, tmp_path):
    path = tmp_path / "one.ckpt"
    whole = setup_of("dp-bitfit", **{**CYCLIC, **more})
    made = trained(whole, watched=False)
    stopped(setup_of("dp-bitfit", path, **{**CYCLIC, **more}))
    assert path.exists()
    resumed = setup_of("dp-bitfit", path, **{**CYCLIC, **more})
    again = trained(resumed, watched=False)
    assert again.progress.curve == made.progress.curve and again.progress.chain == made.progress.chain
    assert again.progress.ledger.events == made.progress.ledger.events
    assert made.progress.ledger.sampling.kind == more["sampler"]
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())


def test_a_run_with_bands_is_accounted_and_verified(tiny_bert, settings):
    record, curve = run.execute(a_spec("dp-bitfit", tiny_bert, **CYCLIC, bands=3, steps=5), settings, quiet)
    assert record["status"] == "done", record["error"]
    assert verify_run(json.loads(json.dumps(record)), curve).findings == []
    spent = [row["epsilon"] for row in curve]
    assert spent[0] == spent[2] < spent[3] == spent[4] == pytest.approx(record["privacy"]["epsilon"][2], abs=1e-9)
    forged = json.loads(json.dumps(record))
    forged["privacy"]["ledger"][0]["sampling"]["groups"] = 2
    assert any("the spec's settings give" in text for text in verify_run(forged, curve).findings)


@pytest.mark.parametrize("method", sorted(registry.methods()))
def test_every_method_takes_every_sampler_or_says_why_not(method, setup_of):
    """Four steps on empty batches: what it asks is released and booked, where noise is correlated once a step in one space."""
    fewer = {"directions": 2} if method == "dp-zo" else {}
    for more in ({"sampler": "truncated", "truncated_batch_size": 30}, {"sampler": "cyclic", "bands": 2}):
        try:
            setup = setup_of(method, **{**CYCLIC, **more, **fewer})
        except BadInput as reason:
            assert "leave out bands" in str(reason) or "may release one sum" in str(reason)
            continue
        setup.sampler.sample = lambda: []
        with unevaluated():
            made = trained(setup, watched=False)
        assert made.progress.step == 4
        if setup.private:
            booked = made.progress.ledger
            assert (
                booked.steps == 4 and booked.sampling == setup.plan.sampling and booked.sampling.kind == more["sampler"]
            )
            assert certify(booked.events, setup.plan.delta, 3.0, 2)["within_budget"]
            assert len(setup.mechanism.kept()) == (2 + len(setup.parameters) if "bands" in more else 0)

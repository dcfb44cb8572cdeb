"""DP-GRAPE in training: Adam in the subspace, the way back, resuming, other settings."""

import dataclasses

import pytest
import torch
from asking import answered, encodings_of
from engine_cases import batch_for, loss, model_for, no_clock
from grape_cases import adam_by_hand, method_for, resumes_bit_for_bit
from small_runs import a_spec, quiet, silent, trained, weights

from dpft.harness.engine.base import example_gradient, zero_sums
from dpft.harness.engine.reference import ReferenceEngine
from dpft.harness.errors import BadInput
from dpft.harness.query import updates
from dpft.harness.query.encoding import Encoding
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.harness.train.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


IDENTITY = {"projection": "identity", "rank": 10_000}


def steps_of(setup, noise="same"):
    """The weights after training with a noise stream that methods share."""
    mechanism = GaussianMechanism(
        setup.mechanism.noise_multiplier, setup.spec.clip_norm, setup.spec.batch_size, source("cpu", noise)
    )
    setup = dataclasses.replace(setup, mechanism=mechanism)
    trained(setup)
    mechanism.close()
    return weights(setup)


@pytest.mark.parametrize("options", [IDENTITY, {"rank": 10_000}])
def test_the_identity_and_a_full_rank_are_dp_adam(options, setup_of):
    """To 1e-6, not bit for bit: torch's fused Adam multiplies and divides in another order than a direction handed to SGD."""
    plain = steps_of(setup_of("dp-adam"))
    same = setup_of("dp-grape", **options)
    assert (len(same.method.sides) == 12) == (options == IDENTITY)
    for name, value in steps_of(same).items():
        assert (value - plain[name]).norm() <= 1e-6 * plain[name].norm() + 1e-7, name
    other = steps_of(setup_of("dp-grape", rank=16))
    assert any((other[n] - plain[n]).norm() > 1e-3 * plain[n].norm() for n in plain if plain[n].dim() == 2)


def test_with_sgd_the_identity_is_dp_sgd_bit_for_bit(setup_of):
    settings = {"lr": 0.02, "momentum": 0.5, "optimizer": "sgd", "head_lr_factor": 1.0, "weight_decay": 0.01}
    plain, same = steps_of(setup_of("dp-sgd", **settings)), steps_of(setup_of("dp-grape", **IDENTITY, **settings))
    assert all(torch.equal(value, plain[name]) for name, value in same.items())


@pytest.mark.parametrize("reset", [False, True])
def test_adam_runs_in_the_subspace_and_starts_anew_only_when_told(reset, setup_of):
    setup = setup_of("dp-grape", refresh=2, reset=reset)
    setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    name, bias = next(iter(setup.method.sides)), next(n for n, p in setup.parameters.items() if p.dim() == 1)
    releases = {name: [], bias: []}
    for step in range(4):
        torch.manual_seed(step)
        maps = encodings_of(setup.method, setup.parameters, step)
        sums = {n: torch.randn(t.shape) for n, t in zero_sums(setup.parameters, maps).items()}
        for n, seen in releases.items():
            seen.append(sums[n].double() / 60)
        update = answered(setup.method, step, silent().release(sums))
        resets = (2,) if reset else ()
        by_hand = adam_by_hand(releases[name], resets) @ maps[name].right.double().T
        assert torch.allclose(update[name].double(), by_hand, rtol=1e-4, atol=1e-5)
        assert torch.allclose(update[bias].double(), adam_by_hand(releases[bias]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"refresh": 2},
        {"refresh": 3},
        {"refresh": 3, "reset": True, "projection": "srht"},
        {"refresh": 3, "decoder": "doppler", "projection": "rows"},
        {"refresh": 3, "decoder": "adambc"},
        {"refresh": 2, "optimizer": "sgd", "momentum": 0.9, "lr": 0.02},
    ],
)
def test_a_run_cut_around_a_refresh_resumes_bit_for_bit(options, setup_of, tmp_path):
    resumes_bit_for_bit("dp-grape", options, setup_of, tmp_path)


@pytest.fixture(scope="module")
def ledger(tiny_bert, mirror):
    """Of a run of dp-grape as it is."""
    return run.execute(a_spec("dp-grape", tiny_bert), Settings(data_dir=mirror), quiet)[0]["privacy"]["ledger"]


@pytest.mark.parametrize(
    "more",
    [
        {"decoder": "rmt"},
        {"decoder": "rmt", "input": "ema", "reset": False},
        {"decoder": "rmt", "reset": True},
        {"decoder": "muon"},
        {"clip_groups": "layer", "projection": "srht", "projection_scale": "code"},
        {"embeddings": "projected", "head": "mlm"},
        {"projection": "rows", "optimizer": "adamw", "weight_decay": 0.01},
    ],
)
def test_it_runs_with_other_choices_and_spends_the_same(more, ledger, tiny_bert, settings):
    other, _ = run.execute(a_spec("dp-grape", tiny_bert, **more), settings, quiet)
    assert other["status"] == "done", other["error"]
    assert other["privacy"]["ledger"] == ledger


def test_a_decoder_denoises_the_release_in_the_subspace(setup_of):
    """Everything within reach of the noise is dropped: the release is white there, so nothing is left of pure noise."""
    setup = setup_of("dp-grape", decoder="rmt", optimizer="sgd", scope="body")
    maps = encodings_of(setup.method, setup.parameters)
    sums = zero_sums(setup.parameters, maps)
    noisy = GaussianMechanism(1.0, 1.0, 60, source("cpu", 0)).release(sums)
    spiked = next(iter(maps))
    noisy.tensors[spiked][:, 0] += 1.0
    update = answered(setup.method, 0, noisy)
    assert float(update[spiked].norm()) > 1
    assert all(not update[name].any() for name in maps if name != spiked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection": "gausian"}, "no projection called 'gausian'; did you mean 'gaussian'"),
        ({"projection_scale": "paper"}, "projection_scale"),
        ({"embeddings": "frozen"}, "no embeddings called 'frozen'"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"refresh": 0}, "refresh must be 1 or more"),
        ({"reset": True, "decoder": "doppler"}, "not what the decoder doppler carries"),
        ({"reset": True, "decoder": "adambc"}, "not what the decoder adambc carries"),
        ({"reset": True, "decoder": "rmt", "input": "ema"}, "not what the decoder rmt carries"),
    ],
)
def test_bad_settings_are_refused_before_anything_trains(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "dp-grape", **settings})


def test_lazy_updates_are_applied_a_few_at_a_time_with_the_same_result(monkeypatch):
    monkeypatch.setattr(updates, "_TOGETHER", 10)
    torch.manual_seed(0)
    parameters = {str(n): torch.nn.Parameter(torch.randn(n)) for n in (4, 5, 6, 20, 1)}
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    parts, held = {name: torch.randn(p.shape) for name, p in parameters.items()}, []

    def make(name, part):
        held.append(sum(p.numel() for p in parameters.values() if p.grad is not None))
        return 2 * part

    lazy = updates.LazyUpdates(parts, make)
    for _ in range(3):  # Adam: its state is kept by parameter
        for some, update in ((parameters, lazy), (copies, {name: 2 * part for name, part in parts.items()})):
            optimizer = torch.optim.Adam(some.values(), lr=0.1)
            updates.apply(optimizer, some, update)
    assert all(torch.equal(p, copies[name]) and p.grad is None for name, p in parameters.items())
    assert held == [0, 4, 0, 0, 0] * 3
    assert updates.finite(lazy) and not updates.finite(updates.LazyUpdates({"a": torch.tensor([float("nan")])}, make))


def test_examples_are_let_go_as_soon_as_they_are_encoded():
    """The reference and the check before a run hold no more than the encoded gradients."""
    model, batch = model_for("bert"), batch_for("bert")
    parameters = dict(model.named_parameters())
    maps = encodings_of(method_for(model, rank=1), parameters)
    held, dense = [], Encoding.dense

    def watched(self, gradient):
        held.append(sum(p.grad is not None for p in parameters.values()))
        return dense(self, gradient)

    engine = ReferenceEngine(model, loss, parameters, no_clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoding, "dense", watched)
        _, found = example_gradient(engine, {k: v[:1] for k, v in batch.items()}, maps)
    assert list(found) == list(parameters) and max(held) == 1 and len(held) == len(parameters)
    assert all(found[n].shape == maps[n].shape(p.shape) for n, p in parameters.items() if n in maps)

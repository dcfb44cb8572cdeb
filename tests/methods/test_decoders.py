"""Decoders beside methods: how they are chosen and named, what they do in the real loop, and each one's own algorithm."""

import dataclasses
import json

import pytest
import torch
from small_runs import a_spec, quiet, stopped, trained, weights
from torch import nn

from dpft.harness.errors import BadInput
from dpft.harness.runs import registry, spec
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.methods.base import Method
from dpft.methods.decoders import muon, spectral
from dpft.methods.decoders.matrices import matrix_names, views

pytestmark = pytest.mark.usefixtures("one_thread")
IDENTITY = {"decoder": "rmt", "threshold": "kappa", "kappa": 0.0, "shrinker": "power", "power": 1.0}


def resolved(**more):
    return resolve({"task": "sst2", "method": "dp-adam", **more})


def released(tensors, noise_multiplier=1.0, clip_norm=1.0, batch=10):
    """A NoisySum whose noise is said to be sigma C/B, with the values given."""
    silent = GaussianMechanism(0.0, clip_norm, batch, source("cpu", 0))
    noisy = silent.release({name: tensor * batch for name, tensor in tensors.items()})
    return dataclasses.replace(noisy, noise_multiplier=noise_multiplier)


def decoder(name, model=None, optimizer="adam", **options):
    """A decoder that is set up for `model`, or for one linear layer."""
    model = model or nn.Linear(6, 4)
    found = registry.decoder(name)(options)
    found.setup(model, dict(model.named_parameters()), frozenset(), resolved(optimizer=optimizer))
    return found


# --- names, options, run ids


def test_the_default_decoder_leaves_run_ids_alone_and_another_changes_them():
    assert '"decoder' not in resolved().canonical()
    assert resolved(decoder="mean").run_id == resolved().run_id
    ids = {resolved(**more).run_id for more in ({}, {"decoder": "rmt"}, {"decoder": "rmt", "shrinker": "nuclear"})}
    assert len(ids) == 3


def test_options_of_method_and_decoder_are_one_namespace():
    found = resolve({"task": "sst2", "method": "dp-lora", "decoder": "rmt", "shrinker": "nuclear", "rank": 4})
    assert found.options == {"shrinker": "nuclear", "rank": 4}
    method = registry.make(found.method, found.decoder, found.options)
    assert method.settings["rank"] == 4 and "shrinker" not in method.settings
    assert method.decoder.settings["shrinker"] == "nuclear" and "rank" not in method.decoder.settings


def test_a_preset_is_a_decoder_with_other_defaults():
    preset = resolved(method="rmt-paper")
    assert (preset.decoder, preset.options) == ("rmt", {})
    settings = registry.make("rmt-paper", "rmt", {}).decoder.settings
    assert settings["threshold"] == "kappa" and settings["norm_correction"] == "noisy" and settings["empty"] == "raw"
    assert resolved(method="rmt-paper", threshold="kappa").options == {}, "the preset's own default is left out"
    assert resolved(method="rmt-paper", threshold="tracy-widom").options == {"threshold": "tracy-widom"}
    assert resolved(method="rmt-paper", decoder="doppler", pole=0.5).options == {"pole": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "rnt"}, "no decoder called 'rnt'; did you mean 'rmt'"),
        ({"decoder": "rmt", "shrinker": "frobenus"}, "no shrinker called 'frobenus'; did you mean 'frobenius'"),
        ({"decoder": "rmt", "shrinkr": "nuclear"}, "no setting of dp-adam with decoder rmt called 'shrinkr'"),
        ({"shrinker": "nuclear"}, "no setting of dp-adam called 'shrinker'"),
        ({"decoder": "rmt", "beta": 1.0}, "beta must be between 0 and 1"),
        ({"decoder": "rmt", "kappa": -1}, "kappa must be 0 or more"),
        ({"decoder": "rmt", "kappa": float("nan")}, "kappa must be"),
        ({"decoder": "rmt", "scope": "(("}, "nor a regular expression"),
        ({"decoder": "rmt", "gate": True, "shrinker": "hard"}, "gate needs a continuous shrinker"),
        ({"decoder": "adambc", "optimizer": "sgd"}, "set optimizer to adam"),
        ({"decoder": "muon", "polynomial": "tailor"}, "did you mean 'taylor'"),
        ({"decoder": 3}, "decoder must be a text, not 3"),
    ],
)
def test_bad_choices_are_refused_before_anything_trains(settings, message):
    with pytest.raises(BadInput, match=message):
        resolved(**settings)


def test_names_that_mean_two_things_are_refused(monkeypatch):
    fields = {f.name for f in dataclasses.fields(spec.RunSpec)}
    for method in registry.methods().values():
        for post in registry.decoders().values():
            assert not fields & registry.defaults_of(method, post).keys()
    monkeypatch.setattr(registry.decoder("doppler"), "options", {"rank": 1})
    with pytest.raises(BadInput, match="Method dp-lora and decoder doppler both have an option 'rank'"):
        resolve({"task": "sst2", "method": "dp-lora", "decoder": "doppler"})


def test_the_command_line_shows_decoders_and_refuses_typos(tiny_bert, mirror, tmp_path, monkeypatch, capsys):
    from dpft.harness import cli

    def dpft(*arguments):
        monkeypatch.setattr("sys.argv", ["dpft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    listed = json.loads(dpft("list", "decoders", "--json")[1])
    assert {"mean", "rmt", "doppler", "adambc", "muon"} <= {row["name"] for row in listed}
    about = json.loads(dpft("describe", "rmt-paper", "--json")[1])
    assert about["decoder"] == "rmt" and about["options"]["norm_correction"] == "noisy"
    assert json.loads(dpft("describe", "muon", "--json")[1])["used by"] == ["dp-muon"]
    where = ["--task", "sst2", "--model", tiny_bert, "--data-dir", mirror, "--results", tmp_path / "runs"]
    for typo in ("decoder=rnt", "shrinker=foo", "shrinkr=nuclear"):
        code, _, err = dpft("run", *where, "--method", "dp-lora", "--set", "decoder=rmt", "--set", typo)
        assert code == 2 and "Traceback" not in err


def test_a_plugin_may_bring_a_decoder(tmp_path):
    path = tmp_path / "signs.py"
    path.write_text(
        "from dpft.methods.decoders.base import Decoder\n\n\nclass Signs(Decoder):\n    name = 'signs'\n\n"
        "    def decode(self, noisy, step):\n        return {k: v.sign() for k, v in noisy.mean().items()}\n"
    )
    try:
        registry.load_plugin(path)
        assert resolved(decoder="signs").decoder == "signs"
    finally:
        registry._PLUGINS.clear()
        registry.forget()


# --- in the loop


def test_keeping_every_singular_value_is_dp_adam_bit_for_bit(setup_of):
    plain, same = setup_of("dp-adam"), setup_of("dp-adam", **IDENTITY)
    first, second = trained(plain), trained(same)
    assert first.progress.curve == second.progress.curve
    assert first.progress.ledger.events == second.progress.ledger.events
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(same)[name]), name


@pytest.mark.parametrize("method", ["dp-lora", "dp-bitfit", "last-layer", "dp-sgd", "noise-only", "non-private"])
def test_any_method_runs_with_rmt_and_spends_the_same(method, tiny_bert, settings):
    runs = [a_spec(method, tiny_bert), a_spec(method, tiny_bert, decoder="rmt", shrinker="nuclear")]
    records = [run.execute(one, settings, quiet)[0] for one in runs]
    assert [r["status"] for r in records] == ["done", "done"], records[1]["error"]
    assert records[0]["privacy"] == records[1]["privacy"]


def test_what_the_decoder_saw_is_recorded_at_evaluated_steps(tiny_bert, settings):
    record, _ = run.execute(a_spec("rmt", tiny_bert, scope="body"), settings, quiet)
    rows = record["diagnostics"]["decoder_by_parameter"]
    assert [row.pop("step") for row in rows] == [2, 4]
    for row in rows:
        assert row and not any(name.startswith("head") or "embeddings" in name for name in row)
        for seen in row.values():
            assert 0 <= seen["spikes"] <= seen["of"] and 0 <= seen["kept"] <= 1 and isinstance(seen["trusted"], bool)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("decoder", ["rmt", "doppler", "muon", "adambc"])
def test_lora_resumes_bit_for_bit_with_a_decoder_that_has_a_state(decoder, setup_of, tmp_path):
    more = {"decoder": decoder} | ({"input": "ema", "floor": True} if decoder == "rmt" else {})
    whole_setup = setup_of("dp-lora", **more)
    whole = trained(whole_setup)
    path = tmp_path / "run.ckpt"
    stopped(setup_of("dp-lora", path, **more))
    resumed = setup_of("dp-lora", path, **more)
    made = trained(resumed)
    assert len(made.cost.step_seconds) == 4 and made.progress.curve == whole.progress.curve
    assert made.diagnostics.decoder_by_parameter == whole.diagnostics.decoder_by_parameter
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole_setup)[name])


def test_a_decoder_without_a_matrix_says_so(tiny_bert, settings):
    record, _ = run.execute(a_spec("dp-bitfit", tiny_bert, decoder="rmt", scope="body"), settings, quiet)
    assert record["status"] == "error" and "finds no matrix" in record["error"]


def test_preconditioned_updates_are_applied_by_plain_sgd_with_the_heads_lr(setup_of):
    setup = setup_of("rmt-momentum", weight_decay=0.01)
    optimizer = setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    assert type(optimizer) is torch.optim.SGD
    assert [(g["lr_factor"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (1.0, 0, 0.01),
        (100.0, 0, 0.01),
    ]
    assert type(Method().optimizer(setup.parameters, setup.head, setup.spec)) is torch.optim.Adam


# --- which tensors are matrices


def test_fused_projections_are_cut_and_adapters_on_them_only_in_b():
    def shapes(name, *shape):
        return {key.removeprefix(name): tuple(v.shape) for key, v in views(name, torch.zeros(shape)).items()}

    third = {"[q]": (8, 8), "[k]": (8, 8), "[v]": (8, 8)}
    assert shapes("h.0.attn.c_attn.weight", 8, 24) == shapes("l.Wqkv.weight", 24, 8) == third
    assert shapes("l.attn.in_proj_weight", 24, 8) == shapes("l.query_key_value.weight", 24, 8) == third
    assert shapes("l.qkv_proj.weight", 16, 8) == {"[q]": (8, 8), "[k]": (4, 8), "[v]": (4, 8)}
    assert shapes("h.c_attn.lora_B.default.weight", 24, 2) == {f"[{p}]": (8, 2) for p in "qkv"}
    assert shapes("h.c_attn.lora_A.default.weight", 2, 24) == {"": (2, 24)}
    assert shapes("l.query.weight", 8, 24) == {"": (8, 24)}
    assert shapes("conv.weight", 4, 3, 2, 2) == {"": (4, 12)} and shapes("head.weight", 1, 8) == {}


def test_each_part_of_a_fused_projection_is_denoised_on_its_own():
    model = nn.ModuleDict({"c_attn": nn.Linear(40, 120, bias=False)})
    generator = torch.Generator().manual_seed(0)
    strong = torch.outer(torch.randn(40, generator=generator), torch.randn(40, generator=generator))
    release = 0.1 * torch.randn(120, 40, generator=generator)
    release[40:80] += strong
    found = decoder("rmt", model, level=1e-4)
    found.observing = True
    got = found.decode(released({"c_attn.weight": release}), 0)["c_attn.weight"]
    assert {name[-2]: seen["spikes"] for name, seen in found.observed.items()} == {"q": 0, "k": 1, "v": 0}
    assert not got[:40].any() and not got[80:].any()
    assert (got[40:80] - strong).norm() < 0.25 * (release[40:80] - strong).norm()


def test_scope_and_what_is_no_matrix():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "conv": nn.Conv2d(3, 4, 2), "head": nn.Linear(4, 3)})
    names = dict(model.named_parameters())
    assert matrix_names(model, names, frozenset(), "all") == {"conv.weight", "head.weight"}
    assert matrix_names(model, names, frozenset({"head.weight"}), "body") == {"conv.weight"}
    assert matrix_names(model, names, frozenset(), "^head") == {"head.weight"}
    model["head"].weight = model["table"].weight  # tied: one parameter, and a table
    assert matrix_names(model, dict(model.named_parameters()), frozenset(), "all") == {"conv.weight"}


def test_level_is_shared_by_all_matrices():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    alone, both = decoder("rmt", nn.Linear(8, 8)), decoder("rmt", model)
    assert both._kappa(8, 8, 2) == spectral.tracy_widom_kappa(8, 8, 0.025) > alone._kappa(8, 8, 1)


def test_rmt_on_the_running_mean_without_a_threshold_is_adam():
    """Nothing dropped: the direction must be that of torch's Adam, whose steps at lr 1 are its negative."""
    torch.manual_seed(0)
    found = decoder("rmt", input="ema", threshold="kappa", kappa=0.0, shrinker="power")
    weight = nn.Parameter(torch.zeros(4, 6))
    adam = torch.optim.Adam([weight], lr=1.0)
    for step in range(5):
        before, weight.grad = weight.detach().clone(), torch.randn(4, 6)
        update = found.decode(released({"weight": weight.grad, "bias": torch.ones(4)}), step)
        adam.step()
        assert torch.allclose(update["weight"], before - weight, rtol=1e-4, atol=1e-6)
        assert torch.allclose(update["bias"], torch.ones(4), rtol=1e-5)


def test_doppler_passes_a_constant_and_stops_the_highest_frequency():
    constant, alternating = decoder("doppler"), decoder("doppler")
    for step in range(40):
        update = constant.decode(released({"weight": torch.full((4, 6), 3.0)}), step)["weight"]
        assert torch.allclose(update, torch.full((4, 6), 3.0), rtol=1e-5)
        wave = alternating.decode(released({"weight": torch.full((4, 6), 3.0 * (-1) ** step)}), step)["weight"]
    assert wave.abs().max() < 0.01 * 3
    mean = decoder("doppler", delayed=0.0)
    mean.decode(released({"weight": torch.ones(4, 6)}), 0)
    second = mean.decode(released({"weight": torch.zeros(4, 6)}), 1)["weight"]
    assert torch.allclose(second, torch.full((4, 6), 0.09 / 0.19))


def test_adambc_takes_the_noise_out_of_the_second_moment():
    """After one step mhat = g and vhat = g^2; s = .1."""
    values = torch.tensor([1.0, 0.2, 0.05])
    expected = values / torch.tensor([0.99, 0.03, 0.001]).sqrt()
    corrected = decoder("adambc").decode(released({"bias": values.clone()}), 0)["bias"]
    assert torch.allclose(corrected, expected, rtol=1e-5)
    floor = decoder("adambc", correct=False, gamma=4.0).decode(released({"bias": values.clone()}), 0)["bias"]
    assert torch.allclose(floor, values / torch.tensor([1.0, 0.04, 0.04]).sqrt(), rtol=1e-5)


def test_muon_makes_singular_values_equal_and_gives_the_rest_to_adam():
    matrix = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact = muon.orthogonalised(matrix, 30, muon.POLYNOMIALS["taylor"])
    assert torch.allclose(exact, u @ v, atol=1e-4)
    assert torch.allclose(muon.orthogonalised(matrix.mT, 30, muon.POLYNOMIALS["taylor"]), exact.mT, atol=1e-5)
    fast = torch.linalg.svdvals(muon.orthogonalised(matrix, 5, muon.POLYNOMIALS["fast"]))
    assert fast.min() > 0.6 and fast.max() < 1.3
    update = decoder("muon").decode(released({"weight": torch.randn(4, 6), "bias": torch.tensor([2.0, -3.0])}), 0)
    assert torch.allclose(update["bias"], torch.tensor([1.0, -1.0]), rtol=1e-4)
    assert float(update["weight"].square().mean().sqrt()) == pytest.approx(0.2, rel=0.3), "the size of Adam's entries"

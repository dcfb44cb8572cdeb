"""SPARTA and the other sparse methods: what trains when, how rows are chosen, what it costs, what stays as it was."""

import math

import pytest
import torch
from asking import answered, encodings_of, first
from engine_cases import batch_for, clipped, loss, model_for, no_clock
from image_cases import batch_of, model_of
from small_runs import a_spec, not_private, quiet, silent, stopped, trained, unwatched, weights

from dpft.harness import probes
from dpft.harness.engine import engine_class
from dpft.harness.engine.base import PlainEngine, example_gradient, zero_sums
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.probes import LiveBytes
from dpft.harness.query.encoding import Encoding
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import loop, run
from dpft.harness.train.settings import Settings
from dpft.tasks.digits import Digits

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = ["sparta", "magnitude-rows", "random-rows", "oracle-rows"]
PHASES = {"steps": 6, "warmup_fraction": 0.34, "selection_fraction": 0.34, "eval_every": 3}  # 2, 2 and 2 steps


def method_for(model, name="sparta", steps=10, **options):
    model.head_parameters = [n for n, _ in model.named_parameters() if "head" in n or "classifier" in n]
    method = registry.make(name, "mean", options)
    method.steps = steps
    method.prepare(model, torch.Generator().manual_seed(0))
    return method, {n: p for n, p in model.named_parameters() if p.requires_grad}


# --- phases


def test_each_phase_asks_for_what_it_trains_or_chooses(setup_of):
    setup = setup_of("sparta", **PHASES)
    method, parameters = setup.method, setup.parameters
    assert setup.starts == (0, 2, 4)
    assert [method.kind(s) for s in range(6)] == ["warm-up"] * 2 + ["selection"] * 2 + ["training"] * 2
    assert all(list(first(method, s)) == ["gradient"] for s in range(4)), "one question a step"
    asked = {}
    release = setup.mechanism.release

    def spy(total, *how):
        asked[len(asked)] = {name: tuple(t.shape) for name, t in total.items() if t.numel()}
        return release(total, *how)

    setup.mechanism.release = spy
    moved, apply = [], loop._apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_apply", lambda *a: (moved.append(bool(a[2])), apply(*a)))
        made = trained(setup)
    vectors = {n for n, p in parameters.items() if p.dim() == 1} | set(setup.head)
    assert set(parameters) == vectors | set(method.matrices) and len(method.matrices) == 12
    assert set(asked[0]) == set(asked[1]) == vectors
    assert asked[2] == asked[3] == {n: tuple(p.shape) for n, p in parameters.items() if n in method.matrices}
    for name, rows in method.chosen.items():
        assert (
            asked[5][name] == (round(0.2 * len(parameters[name])), parameters[name].shape[1])
            and len(rows) == asked[5][name][0]
        )
    assert moved == [True, True, False, False, True, True]
    assert made.progress.ledger.steps == 6 and len(made.progress.ledger.events) == 1


@pytest.mark.parametrize("score", ["release", "absolute"])
def test_the_ledger_is_that_of_dp_adam_for_equal_steps(score, tiny_bert, settings):
    plain, sparse = (
        run.execute(a_spec(m, tiny_bert, **more), settings, quiet)[0]["privacy"]
        for m, more in (("dp-adam", {}), ("sparta", {"score": score}))
    )
    assert sparse["ledger"] == plain["ledger"] and sparse["epsilon"] == plain["epsilon"]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", SPARSE)
def test_rows_that_were_not_chosen_keep_their_bits(method, optimizer, setup_of):
    more = {"optimizer": optimizer, "momentum": 0.9, "lr": 0.02}
    setup = setup_of(method, **more, **(PHASES if method in ("sparta", "oracle-rows") else {}))
    before = weights(setup)
    trained(setup, watched=False)
    after = weights(setup)
    for name, rows in setup.method.chosen.items():
        frozen = torch.ones(len(after[name]), dtype=torch.bool).index_fill(0, rows, False)
        assert frozen.any() and torch.equal(after[name][frozen], before[name][frozen])
        assert not any(torch.equal(after[name][row], before[name][row]) for row in rows.tolist())
    assert all(torch.equal(after[n], before[n]) for n in after if n not in setup.parameters)


@pytest.mark.parametrize("more", [{"score": "absolute"}, {"optimizer": "sgd", "momentum": 0.9}])
def test_a_run_cut_in_any_phase_resumes_bit_for_bit(more, setup_of, tmp_path):
    whole, path = setup_of("sparta", **PHASES, **more), tmp_path / "run.ckpt"
    made = trained(whole)
    for cut in (1, 3, 4, 5):
        with unwatched():
            stopped(setup_of("sparta", path, **PHASES, **more), cut + 1)
        resumed = setup_of("sparta", path, **PHASES, **more)
        seen = []
        again = trained(resumed, lambda step, row, seen=seen: seen.append(step), watched=False)
        assert seen[0] == cut + 1 and again.progress.curve == made.progress.curve
        assert again.diagnostics.selection == made.diagnostics.selection
        assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
        path.unlink()


def test_moments_start_anew_after_the_selection_and_have_the_size_of_the_rows(setup_of):
    setup = setup_of("sparta", **{**PHASES, "steps": 5, "warmup_fraction": 0.4})
    trains = trained(setup).cost.trains
    state = setup.method.state_dict()
    name = next(iter(setup.method.chosen))
    p = setup.parameters[name]
    first = state[f"adam_first|{name}"]
    assert first.shape == (round(0.2 * len(p)), p.shape[1]) and not any(k.startswith("score|") for k in state)
    moments = sum(t.numel() for k, t in state.items() if k.startswith("adam"))
    assert moments == 2 * trains < 2 * sum(p.numel() for p in setup.parameters.values())


# --- what is chosen


@pytest.mark.parametrize("score", ["release", "absolute"])
def test_rows_are_chosen_by_releases_and_by_nothing_else(score):
    method, parameters = method_for(model_for("bert").float(), score=score)
    mechanism = silent(2)
    name = next(iter(method.matrices))
    total = 0
    method.steps = 20
    method.settings["selection_fraction"] = 0.1  # warm-up 0-3, selection 4 and 5
    for step in (4, 5):
        torch.manual_seed(step)
        maps = encodings_of(method, parameters, step)
        sums = {n: torch.randn_like(t) for n, t in zero_sums(parameters, maps).items()}
        one = sums[name].double() / 2
        total = total + (one.abs() if score == "release" else one).sum(1)
        assert answered(method, step, mechanism.release(sums)) == {}
    expected = total.topk(round(0.2 * len(total))).indices.sort().values
    assert torch.equal(method.chosen[name], expected)
    assert all(len(rows) == max(1, round(0.2 * method.matrices[n][0])) for n, rows in method.chosen.items())


def test_static_baselines_choose_by_weights_or_by_chance():
    model = model_for("vit").float()
    weights_of = {n: p.detach().clone() for n, p in model.named_parameters()}
    method, _ = method_for(model, "magnitude-rows", trainable_fraction=0.25)
    for name, rows in method.chosen.items():
        sums = weights_of[name].flatten(1).abs().sum(1)
        others = torch.ones(len(sums), dtype=torch.bool).index_fill(0, rows, False)
        assert len(rows) == len(sums) // 4 and sums[rows].min() >= sums[others].max()
    first, second = (method_for(model_for("vit"), "random-rows")[0].chosen for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first), "a function of the method's generator"


def test_the_overlap_with_clean_scores():
    scores: dict = {}
    probes.add_row_scores(
        scores, {"w": torch.tensor([[3.0, -3.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.5]]), "b": torch.ones(3)}
    )
    probes.add_row_scores(scores, {"w": torch.zeros(4, 2), "x": torch.zeros(0, 2)})
    assert scores == {"w": [6.0, 1.0, 2.0, 0.5]}
    found = probes.overlap(scores, {"w": torch.tensor([0, 3])})
    assert found == {"overlap": 0.5, "by_chance": 0.5, "by_parameter": {"w": 0.5}}


def test_without_noise_the_selection_is_the_oracles(tiny_bert, settings, setup_of):
    selection = trained(not_private(setup_of("sparta", **PHASES))).diagnostics.selection
    assert selection["overlap"] == 1.0 and selection["by_chance"] < 0.25
    record, _ = run.execute(a_spec("sparta", tiny_bert, **PHASES), settings, quiet)
    assert 0 <= record["diagnostics"]["selection"]["overlap"] <= 1 and record["diagnostics"]["private"] is False


# --- engines


@pytest.mark.parametrize("engine", ["factored", "reference", "opacus"])
@pytest.mark.parametrize("kind, views", [("bert", 1), ("vit", 1), ("vit", 2), ("resnet", 2)])
@pytest.mark.parametrize("step", [0, 2, 9])
@pytest.mark.parametrize("score", ["release", "absolute"])
def test_engines_agree_with_autograd_in_every_phase(engine, kind, views, step, score):
    if (engine, kind) == ("opacus", "resnet"):
        pytest.skip("Opacus's hooks forbid the in-place sum of transformers' ResNet")
    if kind == "bert":
        model, batch, objective = model_for("bert"), batch_for("bert"), loss
    else:
        model, batch, objective = model_of(kind, views), batch_of(3, views, 8 if kind == "vit" else 32), Digits().loss
    method, parameters = method_for(model, score=score)
    method.chosen = {n: torch.arange(0, shape[0], 3) for n, shape in method.matrices.items()}
    maps = encodings_of(method, parameters, step)
    one = engine_class("reference")(model, objective, parameters, no_clock)
    expected = zero_sums(parameters, maps)
    norms = []
    for i in range(len(batch["labels"])):
        _, plain = example_gradient(one, {k: v[i : i + 1] for k, v in batch.items()}, {})
        kept = {n: maps[n].dense(g[None])[0] if n in maps else g for n, g in plain.items()}
        if step == 2 and score == "absolute":
            kept = {n: g.abs() for n, g in kept.items()}
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in kept.values())))
        for n, g in kept.items():
            expected[n] += g * min(1.0, 0.3 / norms[-1])
    found, _, found_norms = clipped(engine, model, batch, 0.3, maps, parameters, objective)
    assert found_norms[:, 0].tolist() == pytest.approx(norms, rel=1e-9)
    largest = max(float(t.norm()) for t in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-9 * largest, name


def test_magnitudes_are_summed_one_example_at_a_time_from_factors():
    """A wide layer on few tokens keeps its factors; a table and the non-private engine have no magnitudes of examples."""
    from dpft.harness.engine.pieces import AbsolutePiece, EmbeddingPiece, LinearPiece, absolute

    torch.manual_seed(0)
    inputs, gradients = torch.randn(4, 3, 20), torch.randn(4, 3, 30)
    (piece,) = absolute("w", [LinearPiece(inputs, gradients)])
    assert isinstance(piece, AbsolutePiece)
    total, factors = torch.zeros(30, 20), torch.rand(4)
    piece.add_weighted(total, factors)
    assert torch.allclose(total, torch.einsum("b,bpd->pd", factors, (gradients.mT @ inputs).abs()), rtol=1e-5)
    with pytest.raises(CannotRun, match="no rule for magnitudes"):
        absolute("w", [EmbeddingPiece(torch.zeros(4, 3, dtype=torch.long), gradients)])
    model, batch = model_for("vit"), batch_for("vit")
    parameters = {"head.weight": model.head.weight}
    with pytest.raises(BadInput, match="no magnitudes"):
        maps = {"head.weight": Encoding(absolute=True)}
        PlainEngine(model, loss, parameters, no_clock).accumulate(batch, zero_sums(parameters, maps), 1.0, maps)


def test_memory_of_a_training_step_falls_with_the_fraction(setup_of):
    peaks = {}
    for fraction in (1.0, 0.5, 0.05):
        setup = setup_of("sparta", **PHASES, trainable_fraction=fraction)
        trained(setup, watched=False)
        batch, maps = setup.prepared.collate(setup.prepared.train[:8]), encodings_of(setup.method, setup.parameters, 5)
        with LiveBytes(setup.clock) as live:
            sums = zero_sums(setup.parameters, maps)
            setup.engine.accumulate(batch, sums, 1.0, maps)
        state = sum(t.nbytes for t in setup.method.state_dict().values())
        peaks[fraction] = (sum(live.peak.values()), sum(t.numel() for t in sums.values()), state)
    for k in range(3):
        assert peaks[0.05][k] < peaks[0.5][k] < peaks[1.0][k]
    assert peaks[0.05][1] < 0.2 * peaks[1.0][1]


# --- settings, baselines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2}, "would spend 2 of 2 steps before it trains rows"),
        ({"warmup_fraction": 0.99}, "before it trains rows"),
        ({"score": "magnitude"}, "no score called 'magnitude'"),
        ({"trainable_fraction": 0.0}, "trainable_fraction must be between"),
        ({"trainable_fraction": float("nan")}, "trainable_fraction must be a finite number"),
        ({"decoder": "rmt"}, "leave out decoder=rmt"),
        ({"weight_decay": 0.1}, "set weight_decay = 0"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "digits", "method": "sparta", **settings})


def test_what_the_other_baselines_train():
    names = {}
    for method in ("norms-head", "first-last"):
        _, parameters = method_for(model_of("resnet"), method)
        names[method] = set(parameters)
    head = {"model.classifier.1.weight", "model.classifier.1.bias"}
    assert names["first-last"] == {"model.resnet.embedder.embedder.convolution.weight"} | head
    assert head < names["norms-head"] and all("normalization" in n for n in names["norms-head"] - head)
    assert not registry.method("oracle-rows").private and registry.method("oracle-rows").control


@pytest.mark.parametrize("model", ["digits-vit", "digits-resnet"])
def test_sparta_runs_on_images(model):
    small = {"batch_size": 80, "steps": 4, "eval_every": 4, "views": 2, "score": "absolute"}
    one = resolve({"task": "digits", "model": model, "method": "sparta", **small})
    record, _ = run.execute(one, Settings(), quiet)
    assert record["status"] == "done", record["error"]
    assert record["cost"]["trainable_parameters"] < 0.5 * record["cost"]["total_parameters"]

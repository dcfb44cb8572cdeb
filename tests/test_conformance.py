"""Every registered method, without being asked: what holds for all of them."""

import dataclasses

import pytest
import torch
from small_runs import a_spec, quiet, trained, weights

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import PlainEngine, zero_sums
from dpft.harness.runs import registry
from dpft.harness.train import evaluation, loop, run
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source

METHODS = sorted(registry.methods())
PRIVATE = [name for name in METHODS if registry.methods()[name].private]
LEARNING = [name for name in PRIVATE if registry.methods()[name].query == "gradient"]
# Presets of a decoder differ from dp-adam after the release only: engines have nothing new to agree on.
PARAMETERISED = [name for name in LEARNING if "decoder" not in registry.methods()[name].defaults]
# One preset of each decoder, where what is tested lies outside of it.
DISTINCT = [name for name in METHODS if not registry.methods()[name].decoder_options]


def decoder_of(method):
    return registry.make(method, registry.methods()[method].defaults.get("decoder", "mean"), {}).decoder


def encodings_of(setup, step=0):
    found = {name: setup.method.encoding(name, p, step) for name, p in setup.parameters.items()}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_recorded_spends_its_budget_and_trains_what_it_says(method, tiny_bert, settings, setup_of):
    one = a_spec(method, tiny_bert)
    record, curve = run.execute(one, settings, quiet)
    assert record["status"] == "done", record["error"]
    assert [row["step"] for row in curve] == [1, 2, 3, 4]
    assert [row["metric"] is not None for row in curve] == [False, True, False, True]
    assert record["cost"]["peak_bytes"]["parameters"] > 0
    if one.epsilon is not None:
        privacy = record["privacy"]
        assert privacy["steps_run"] == privacy["steps_planned"] == 4
        assert privacy["ledger"][-1]["step_to"] == 4
        assert 0.975 * 3 <= privacy["epsilon"][1] <= privacy["epsilon"][2] <= 3
        assert privacy["sampling_probability"] == 60 / 600
        assert curve[-1]["epsilon"] == pytest.approx(privacy["epsilon"][2], abs=1e-9)
        assert [row["epsilon"] for row in curve] == sorted(row["epsilon"] for row in curve)
    setup = setup_of(method)
    before = weights(setup)
    trained(setup)
    for name, value in weights(setup).items():
        if name in setup.parameters:
            if value.dim() == 1 or not setup.method.decoder.withholds:
                assert not torch.equal(value, before[name]), f"{name} should train"
        else:
            assert torch.equal(value, before[name]), f"{name} should be frozen"
    assert setup.head <= set(setup.parameters), "the head must train"


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_curve_bit_for_bit(method, setup_of):
    first, second = trained(setup_of(method)), trained(setup_of(method))
    assert first.curve == second.curve and first.final == second.final
    other = trained(setup_of(method, seed=1))
    assert other.curve != first.curve


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method, setup_of, tmp_path):
    whole_setup = setup_of(method)
    whole = trained(whole_setup)
    path = tmp_path / "run.ckpt"

    def interrupt(step, row):
        if step == 3:
            raise KeyboardInterrupt

    cut = dataclasses.replace(setup_of(method, path), checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        loop.train(cut, loop.State(), interrupt)
    resumed_setup = setup_of(method, path)
    seen = []
    state = loop.State()
    loop.train(resumed_setup, state, lambda step, row: seen.append(step))
    assert seen == [3, 4], "steps 1 and 2 must come from the checkpoint"
    assert state.curve == whole.curve and state.final == whole.final
    assert state.ledger.events == whole.ledger.events and state.chain == whole.chain
    for name, value in weights(resumed_setup).items():
        assert torch.equal(value, weights(whole_setup)[name])


def test_a_damaged_or_foreign_checkpoint_is_not_used(setup_of, tmp_path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"not a checkpoint")
    assert len(trained(setup_of("last-layer", path)).step_seconds) == 4
    cut = dataclasses.replace(setup_of("last-layer", path, seed=5), checkpoint_seconds=0.0)
    trained(cut)
    assert path.exists()
    seen = []
    loop.train(setup_of("last-layer", path), loop.State(), lambda step, row: seen.append(step))
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("method", PARAMETERISED)
def test_engines_agree_and_microbatches_do_not_matter(method, setup_of):
    setup = setup_of(method)
    encodings = encodings_of(setup)
    examples = setup.prepared.train[:12]
    sums, norms = {}, {}
    for name, groups in {
        "factored": [examples],
        "pieces": [examples[:1], examples[1:7], examples[7:]],
        "reference": [examples],
        "opacus": [examples],
    }.items():
        engine = engine_class("factored" if name == "pieces" else name)(
            setup.prepared.model, setup.engine.loss, setup.parameters, setup.clock
        )
        total, found = zero_sums(setup.parameters, encodings), []
        for group in groups:
            found.append(engine.accumulate(setup.prepared.collate(group), total, setup.spec.clip_norm, encodings)[1])
        engine.close()
        sums[name], norms[name] = torch.cat([t.flatten().double() for t in total.values()]), torch.cat(found).double()
    for name in ("pieces", "reference", "opacus"):
        assert torch.allclose(norms["factored"], norms[name], rtol=1e-5)
        assert (sums["factored"] - sums[name]).norm() <= 1e-5 * sums[name].norm()
    assert sums["factored"].norm() <= setup.spec.clip_norm * len(examples) * (1 + 1e-6)


@pytest.mark.parametrize("method", [m for m in LEARNING if decoder_of(m).exact_without_noise])
def test_zero_noise_and_infinite_clip_is_the_non_private_optimizer(method, setup_of):
    private, plain = setup_of(method, weight_decay=0.0), setup_of(method, weight_decay=0.0)
    silent = GaussianMechanism(0.0, 1.0, 60, source("cpu", 0))
    unclipped = dataclasses.replace(private.spec, clip_norm=1e30)
    private = dataclasses.replace(
        private, mechanism=silent, spec=unclipped, epsilon_curve=None
    )  # zero noise has no epsilon
    engine = PlainEngine(plain.prepared.model, plain.engine.loss, plain.parameters, plain.clock)
    plain = dataclasses.replace(plain, mechanism=silent, engine=engine, epsilon_curve=None)
    for one in (private, plain):  # plain SGD: Adam would turn rounding of a zero gradient into a full step
        one.method.optimizer = lambda parameters, head, spec: torch.optim.SGD(parameters.values(), lr=0.5)
        trained(one)
    for name in private.parameters:
        a, b = private.parameters[name], plain.parameters[name]
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5, name


@pytest.mark.parametrize("method", PRIVATE)
def test_an_empty_batch_still_adds_noise_steps_and_is_charged(method, setup_of):
    setup = setup_of(method)
    setup.sampler.sample = lambda: []
    before = weights(setup)
    state = trained(setup)
    assert state.ledger.steps == 4
    assert any(not torch.equal(p, before[n]) for n, p in setup.parameters.items())


@pytest.mark.parametrize("method", [m for m in PRIVATE if m in DISTINCT])
def test_noise_and_decode_happen_once_per_logical_step_whatever_the_microbatches(method, setup_of):
    counts, pieces = [], []
    for tokens in (100, 100_000):  # some seven examples at once, or all of them
        setup = dataclasses.replace(setup_of(method), max_tokens=tokens)
        calls = {"release": 0, "decode": 0, "accumulate": 0}
        watched = ((setup.mechanism, "release"), (setup.method, "decode"), (setup.engine, "accumulate"))
        for owner, name in watched:
            original = getattr(owner, name)

            def counted(*arguments, calls=calls, name=name, original=original):
                calls[name] += 1
                return original(*arguments)

            setattr(owner, name, counted)
        trained(setup)
        pieces.append(calls.pop("accumulate"))
        counts.append(calls)
    assert counts == [{"release": 4, "decode": 4}] * 2
    # the comparison with autograd asks the engine as often in both: the difference is microbatches of the four steps
    assert setup.method.query == "none" or pieces[0] - pieces[1] > 4 * 4, pieces


@pytest.mark.parametrize("method", LEARNING)
def test_the_update_is_divided_by_the_expected_batch_size(method, setup_of):
    """Twice the same batch, in one run half of it empty rows of the sampler: the update must not be rescaled."""
    setup = setup_of(method)
    sums = zero_sums(setup.parameters, encodings_of(setup))
    noisy = GaussianMechanism(0.0, 1.0, 60, source("cpu", 0)).release({name: t + 1 for name, t in sums.items()})
    for name, update in setup.method.decode(noisy, 0).items():
        assert update.shape == setup.parameters[name].shape
    realised = []
    setup.mechanism.release = lambda total, original=setup.mechanism.release: (
        realised.append(original(total)) or realised[-1]
    )
    setup.sampler.sample = lambda: [0, 1, 2]
    trained(setup)
    assert {one.expected_batch_size for one in realised} == {60}


@pytest.mark.parametrize("method", [m for m in DISTINCT if m != "noise-only"])
def test_a_nan_example_ends_the_run_before_anything_is_released(method, tiny_bert, settings, monkeypatch):
    one = a_spec(method, tiny_bert)
    task = registry.task("sst2")
    original = task.loss

    def poisoned(self, model, batch):
        losses = original(self, model, batch)
        return losses.where(batch["labels"] == 0, torch.tensor(float("nan")))

    monkeypatch.setattr(task, "loss", poisoned)
    record, curve = run.execute(one, settings, quiet)
    assert record["status"] == "diverged" and "not finite" in record["error"]
    assert curve == [] and record["result"] is None
    if record["privacy"] is not None:
        assert record["privacy"]["steps_run"] == 0 and record["privacy"]["ledger"] == []


def test_methods_share_batches_and_not_noise(setup_of):
    a, b = setup_of("dp-adam"), setup_of("dp-sgd")
    assert [a.sampler.sample() for _ in range(3)] == [b.sampler.sample() for _ in range(3)]
    zeros = {"x": torch.zeros(5)}
    first = a.mechanism.release({k: v.clone() for k, v in zeros.items()})
    assert not torch.equal(first.tensors["x"], b.mechanism.release(zeros).tensors["x"])


def test_ffa_lora_freezes_a_and_lora_trains_it(setup_of):
    lora, ffa = setup_of("dp-lora"), setup_of("ffa-lora")
    assert any("lora_A" in n for n in lora.parameters) and not any("lora_A" in n for n in ffa.parameters)
    assert {n for n in lora.parameters if "lora_A" not in n} == set(ffa.parameters)


def test_a_method_that_cannot_run_is_skipped_with_a_reason(tiny_bert, settings):
    record, _ = run.execute(a_spec("dp-lora", tiny_bert, targets="nothing_here"), settings, quiet)
    assert record["status"] == "error"
    assert "nothing_here" in record["error"]


@pytest.mark.parametrize("head", ["native", "mlm"])
@pytest.mark.parametrize("method", ["dp-adam", "dp-lora", "last-layer"])
def test_every_head_trains_and_the_engines_agree_on_it(method, head, tiny_bert, settings, setup_of):
    """`mlm` ties its output layer to the embeddings: both gradients must be in one norm."""
    record, _ = run.execute(a_spec(method, tiny_bert, head=head), settings, quiet)
    assert record["status"] == "done", record["error"]
    setup = setup_of(method, head=head)
    batch = setup.prepared.collate(setup.prepared.train[:8])
    found = {}
    for name in ("factored", "reference"):
        engine = engine_class(name)(setup.prepared.model, setup.engine.loss, setup.parameters, setup.clock)
        total = zero_sums(setup.parameters, {})
        _, norms = engine.accumulate(batch, total, 0.1, {})
        engine.close()
        found[name] = torch.cat([t.flatten().double() for t in total.values()]), norms.double()
    assert torch.allclose(found["factored"][1], found["reference"][1], rtol=1e-5)
    assert (found["factored"][0] - found["reference"][0]).norm() <= 1e-5 * found["reference"][0].norm()


def test_a_model_that_prepare_wraps_is_the_one_that_is_evaluated(setup_of, monkeypatch):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.encoder, self.head, self.calls = inner.encoder, inner.head, 0

        def forward(self, attention_mask, **inputs):
            self.calls += 1
            hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
            return self.head(hidden[:, 0])

    method = registry.method("dp-adam")
    monkeypatch.setattr(method, "prepare", lambda self, model, generator: Wrapped(model))
    setup = setup_of("dp-adam")
    before = setup.prepared.model.calls
    evaluation.evaluate(setup, loop.State(), 10)
    assert setup.prepared.model.calls > before

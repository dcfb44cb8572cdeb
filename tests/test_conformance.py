"""Every registered method, with every registered clipping rule, without being asked: what holds for all of them."""

import dataclasses

import pytest
import torch
from asking import first, heard, recorded
from small_runs import a_spec, not_private, quiet, trained, weights

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import PlainEngine, zero_sums
from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients, Nothing, named
from dpft.harness.runs import registry
from dpft.harness.runs.releases import shares
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import evaluation, run
from dpft.harness.train.core import encodings_of
from dpft.harness.train.parts import Run
from dpft.methods.clipping.base import ClippingRule

METHODS = sorted(registry.methods())
PRIVATE = [name for name in METHODS if registry.method(name).private]
LEARNING = [name for name in PRIVATE if Gradients in registry.method(name).asks]
BLIND = [name for name in METHODS if set(registry.method(name).asks) == {Nothing}]
# Presets of a decoder differ from dp-adam after the release only: engines have nothing new to agree on.
PARAMETERISED = [name for name in PRIVATE if "decoder" not in registry.method(name).defaults]
# One preset of each decoder, where what is tested lies outside of it.
DISTINCT = [name for name in METHODS if not registry.method(name).decoder_options]


def settings_of(how):
    """`clipping=quantile,clip_groups=layer` as settings of a run; `` is the method as it is."""
    return dict(pair.split("=") for pair in how.split(",") if pair)


def takes(method, how):
    try:
        resolve({"task": "sst2", "method": method, **settings_of(how)})
    except BadInput:
        return False
    return True


# Every other clipping rule: one that asks or adapts with a method for each way of asking, a fixed one with one method.
ASKING = {registry.method(name).step: name for name in reversed(PARAMETERISED)}.values()
WITH_RULES = [
    (method, f"clipping={name}{groups}")
    for name, rule in sorted(registry.clippings().items())
    if name != "abadi"
    for asks in [rule.adaptive or rule.amend is not ClippingRule.amend]
    for method, groups in [(m, "") for m in (ASKING if asks else ["dp-adam"])]
    + asks * [("dp-adam", ",clip_groups=layer")]
    if takes(method, f"clipping={name}{groups}")
]
# Every choice of a method's own, which may be another question.
WITH_CHOICES = [
    (method, f"{option}={choice}")
    for method in PARAMETERISED
    for option, choices in registry.method(method).choices.items()
    for choice in choices
    if choice != registry.method(method).options[option] and takes(method, f"{option}={choice}")
]
CASES = [(method, "") for method in PARAMETERISED] + WITH_RULES + WITH_CHOICES
ALL = [(method, "") for method in METHODS] + WITH_RULES + WITH_CHOICES
BATCHES = [list(range(20 * step, 20 * step + 6)) for step in range(4)]


def decoder_of(method):
    return registry.make(method, registry.method(method).defaults.get("decoder", "mean"), {}).decoder


# Options of methods that make a run as much cheaper as they are smaller, and nothing else of it.
FEWER = {"directions": 2, "trajectory_steps": 16, "trial_steps": 4, "examples": 32}


def fewer(method):
    return {option: value for option, value in FEWER.items() if option in registry.method(method).options}


def built(setup_of, method, how="", path=None, **more):
    return setup_of(method, path, **fewer(method), **settings_of(how), **more)


EXECUTED, WHOLE, PLAINLY = {}, {}, {}  # runs that several tests look at, by what they are


def executed(method, tiny_bert, settings):
    """(spec, record, curve) of the run as `dpft run` makes it, with all that watches over it."""
    if method not in EXECUTED:
        one = a_spec(method, tiny_bert, **fewer(method))
        EXECUTED[method] = one, *run.execute(one, settings, quiet)
    return EXECUTED[method]


def whole(setup_of, method, how=""):
    """(setup, weights at its start, the run, weights at its end) of a run without interruption."""
    if (method, how) not in WHOLE:
        setup = built(setup_of, method, how)
        before = weights(setup)
        made = trained(setup, watched=bool(how))  # `executed` has been watched
        WHOLE[method, how] = setup, before, made, weights(setup)
    return WHOLE[method, how]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_recorded_spends_its_budget_and_trains_what_it_says(method, tiny_bert, settings, setup_of):
    one, record, curve = executed(method, tiny_bert, settings)
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
    setup, before, _, after = whole(setup_of, method)
    for name, value in after.items():
        if name in setup.parameters:
            if value.dim() == 1 or not (setup.method.decoder.withholds or setup.method.withholds):
                assert not torch.equal(value, before[name]), f"{name} should train"
        else:
            assert torch.equal(value, before[name]), f"{name} should be frozen"
    assert setup.head <= set(setup.parameters), "the head must train"


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_curve_bit_for_bit(method, tiny_bert, settings, setup_of):
    """Watched or not, but for spectral decoders. Clipping rules and choices: see the next test, whose runs are of one seed."""
    _, record, curve = executed(method, tiny_bert, settings)
    if registry.method(method).defaults.get("decoder") == "rmt":
        # a singular value decomposition rounds by where its buffers lie, and who counts bytes moves them: both are watched
        made = trained(built(setup_of, method))
    else:
        made = whole(setup_of, method)[2]
    assert made.progress.curve == curve and made.outcome.final == record["result"]["final"]
    other = []
    with pytest.raises(KeyboardInterrupt):  # its first step says it
        trained(built(setup_of, method, seed=1), lambda _, row: other.append(row) or interrupted(), watched=False)
    assert other != curve[:1]


def interrupted():
    raise KeyboardInterrupt


def stopped_inside(setup, at=2):
    """Train until the first question of a step is answered; there the process stops, before the second or the update."""
    trains = setup.method.step

    def step(ask, number):
        answers = []

        def asking(**queries):
            if answers:
                raise KeyboardInterrupt
            answers.append(ask(**queries))
            return answers[0]

        update = trains(asking if number == at else ask, number)
        if number == at:
            raise KeyboardInterrupt
        return update

    setup.method.step = step
    with pytest.raises(KeyboardInterrupt):
        trained(dataclasses.replace(setup, checkpoint_seconds=0.0), watched=False)


@pytest.mark.parametrize("method, how", ALL)
def test_a_run_that_stops_between_two_answers_resumes_bit_for_bit(method, how, setup_of, tmp_path):
    _, _, made, final = whole(setup_of, method, how)
    path, seen = tmp_path / "run.ckpt", []
    stopped_inside(built(setup_of, method, how, path))
    setup = built(setup_of, method, how, path)
    resumed = trained(setup, lambda step, row: seen.append(step), watched=method in ASKING and not how)
    assert seen == [3, 4], "steps 1 and 2 must come from the checkpoint"
    one, other = resumed.progress, made.progress
    assert one.curve == other.curve and resumed.outcome.final == made.outcome.final
    assert one.ledger.events == other.ledger.events and one.chain == other.chain
    for name, value in weights(setup).items():
        assert torch.equal(value, final[name])


def test_a_damaged_or_foreign_checkpoint_is_not_used(setup_of, tmp_path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"not a checkpoint")
    assert len(trained(setup_of("last-layer", path)).cost.step_seconds) == 4
    cut = dataclasses.replace(setup_of("last-layer", path, seed=5), checkpoint_seconds=0.0)
    trained(cut)
    assert path.exists()
    seen = []
    trained(setup_of("last-layer", path), lambda step, row: seen.append(step))
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("method", [name for name in PARAMETERISED if name in LEARNING])
def test_engines_agree_and_microbatches_do_not_matter(method, setup_of):
    setup = built(setup_of, method)
    (question,) = named(heard(setup), Gradients).values()
    encodings = encodings_of(question, setup.parameters)
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
            with engine.under(question.loss):
                batch = setup.prepared.collate(group)
                found.append(engine.accumulate(batch, total, setup.spec.clip_norm, encodings)[1])
        engine.close()
        sums[name], norms[name] = torch.cat([t.flatten().double() for t in total.values()]), torch.cat(found).double()
    for name in ("pieces", "reference", "opacus"):
        assert torch.allclose(norms["factored"], norms[name], rtol=1e-5)
        assert (sums["factored"] - sums[name]).norm() <= 1e-5 * sums[name].norm()
    assert sums["factored"].norm() <= setup.spec.clip_norm * len(examples) * (1 + 1e-6)


@pytest.mark.parametrize("method", [m for m in LEARNING if decoder_of(m).exact_without_noise])
def test_zero_noise_and_infinite_clip_is_the_non_private_optimizer(method, setup_of):
    private, plain = (built(setup_of, method, weight_decay=0.0) for _ in range(2))
    private = not_private(private, spec=dataclasses.replace(private.spec, clip_norm=1e30))
    engine = PlainEngine(plain.prepared.model, plain.engine.loss, plain.parameters, plain.clock)
    plain = not_private(plain, engine=engine)
    for one in (private, plain):  # plain SGD: Adam would turn rounding of a zero gradient into a full step
        one.method.optimizer = lambda parameters, head, spec: torch.optim.SGD(parameters.values(), lr=spec.lr)
        trained(one, watched=False)
    for name in private.parameters:
        a, b = private.parameters[name], plain.parameters[name]
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5, name


@pytest.mark.parametrize("method, how", [(m, "") for m in PRIVATE] + WITH_RULES + WITH_CHOICES)
def test_an_empty_batch_has_sums_of_zero_and_adds_noise_and_steps_and_is_charged(method, how, setup_of):
    setup = built(setup_of, method, how)
    before = weights(setup)
    found, made = recorded(setup, [[]] * 4, watched=False)
    assert made.progress.ledger.steps == 4 and {one.step for one in found} == set(range(4))
    for one in found:
        assert not any(tensor.any() for tensor in one.clean.values())
        assert one.noisy.noise_multiplier == pytest.approx(setup.plan.noise_multiplier / one.share**0.5)
        noise = vector(one.noisy.tensors) * 60 / (one.noisy.noise_multiplier * one.bound)
        assert abs(float(noise.square().mean()) - 1) < 6 * (2 / len(noise)) ** 0.5
    assert any(not torch.equal(p, before[n]) for n, p in setup.parameters.items())


def vector(sums):
    return torch.cat([tensor.flatten().double() for tensor in sums.values()])


def plainly(setup_of, method, how, clip_norm=0.1, max_tokens=None, answers=()):
    """(sums, the run, weights at its end, how often steps were made and examples looked at) of a run on BATCHES."""
    if (method, how, clip_norm, max_tokens) not in PLAINLY:
        setup = built(setup_of, method, how, clip_norm=clip_norm)
        setup = dataclasses.replace(setup, max_tokens=max_tokens or setup.max_tokens)
        looks = "accumulate" if Gradients in setup.method.asks else "losses"
        calls = counted(steps=(setup.method, "step"), passes=(setup.engine, looks))
        made = recorded(setup, BATCHES, answers, watched=False)
        PLAINLY[method, how, clip_norm, max_tokens] = *made, weights(setup), calls
    return PLAINLY[method, how, clip_norm, max_tokens]


def counted(**functions):
    """How often each of these is called from now on: name -> (owner, its function's name)."""
    calls = dict.fromkeys(functions, 0)

    def counting(key, function):
        def called(*arguments):
            calls[key] += 1
            return function(*arguments)

        return called

    for key, (owner, name) in functions.items():
        setattr(owner, name, counting(key, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("method, how", CASES)
def test_one_example_moves_all_releases_of_a_step_by_no_more_than_one_ball(method, how, setup_of):
    """Each release by its bound, and all of them, in units of bounds and shares, by what one release may.

    Both runs get the same answers.
    """
    for clip_norm in (0.1, 3.0) if "clipping" in how else (0.1,):  # below all gradients, and above most of them
        without, *_ = plainly(setup_of, method, how, clip_norm)
        more = [[*batch, 300 + step] for step, batch in enumerate(BATCHES)]
        beside, _ = recorded(built(setup_of, method, how, clip_norm=clip_norm), more, without, watched=False)
        spent, shared = dict.fromkeys(range(4), 0.0), dict.fromkeys(range(4), 0.0)
        for one, other in zip(beside, without, strict=True):
            assert (one.step, one.bound, one.share) == (other.step, other.bound, other.share)
            moved = float((vector(one.clean) - vector(other.clean)).norm()) / one.bound
            assert moved <= 1 + 2e-3
            spent[one.step] += one.share * moved**2
            shared[one.step] += one.share
        assert max(spent.values()) <= 1 + 4e-3 and max(shared.values()) <= 1 + 1e-9, spent
        assert method in BLIND or min(spent.values()) > 0.01, "an example that moves nothing tests nothing"


@pytest.mark.parametrize("method", sorted(ASKING))
def test_a_user_moves_all_releases_of_a_step_by_no_more_than_one_ball(method, setup_of, users_of_sst2):
    """Where whole users are sampled: a user of one to three rows, in every step, beside three others."""
    some = dict(unit="user", group_size=3, batch_size=20, clip_norm=0.1)
    batches = [[4 * step, 4 * step + 1, 4 * step + 2] for step in range(4)]
    without, _ = recorded(built(setup_of, method, **some), batches, watched=False)
    more = [[*batch, 101 + step] for step, batch in enumerate(batches)]
    beside, _ = recorded(built(setup_of, method, **some), more, without, watched=False)
    spent = dict.fromkeys(range(4), 0.0)
    for one, other in zip(beside, without, strict=True):
        moved = float((vector(one.clean) - vector(other.clean)).norm()) / one.bound
        assert moved <= 1 + 2e-3
        spent[one.step] += one.share * moved**2
    assert max(spent.values()) <= 1 + 4e-3, spent
    assert method in BLIND or min(spent.values()) > 0.01, "a user who moves nothing tests nothing"


@pytest.mark.parametrize("method, how", CASES)
def test_an_example_outside_of_the_batch_changes_nothing(method, how, setup_of):
    before, made, final, _ = plainly(setup_of, method, how)
    setup = built(setup_of, method, how, clip_norm=0.1)
    inside = {index for batch in BATCHES for index in batch}
    train = [
        example if i in inside else setup.prepared.train[7 + i % 5] for i, example in enumerate(setup.prepared.train)
    ]
    setup = dataclasses.replace(setup, prepared=dataclasses.replace(setup.prepared, train=train))
    after, other = recorded(setup, BATCHES, watched=False)
    assert all(torch.equal(vector(a.clean), vector(b.clean)) for a, b in zip(before, after, strict=True))
    assert made.progress.curve == other.progress.curve
    assert all(torch.equal(value, final[name]) for name, value in weights(setup).items())


@pytest.mark.parametrize("method, how", [*CASES, *((m, "") for m in PRIVATE if m in DISTINCT and (m, "") not in CASES)])
def test_sums_noise_and_steps_do_not_depend_on_the_microbatches(method, how, setup_of):
    """The same sums, noise and a step once per logical step, whether its six examples are one microbatch or several."""
    together, _, _, once = plainly(setup_of, method, how)
    pieces, _, _, often = plainly(setup_of, method, how, max_tokens=25, answers=together)
    fresh = built(setup_of, method, how).method
    declared = [step for step in range(4) for _ in shares(fresh, step)]
    for found, calls in ((together, once), (pieces, often)):
        assert [one.step for one in found] == declared and calls["steps"] == 4
    for one, other in zip(pieces, together, strict=True):
        assert float((vector(one.clean) - vector(other.clean)).norm()) <= 1e-3 * one.bound
    assert method in BLIND or often["passes"] > once["passes"], "one microbatch a step tests nothing"


@pytest.mark.parametrize("method", PRIVATE)
def test_releases_are_divided_by_the_expected_batch_size_and_updates_have_the_shapes_of_what_trains(method, setup_of):
    """Three examples where 60 are expected: nothing may be rescaled."""
    setup, shapes = built(setup_of, method), []
    trains = setup.method.step

    def step(ask, number):
        update = trains(ask, number)
        shapes.extend((update[name].shape, setup.parameters[name].shape) for name in update)
        return update

    setup.method.step = step
    for one in recorded(not_private(setup), [[0, 1, 2]] * 4, watched=False)[0]:
        assert one.noisy.expected_batch_size == 60
        for name, released in one.noisy.tensors.items():
            assert torch.equal(released, one.clean[name] / 60)
    assert shapes and all(one == other for one, other in shapes)


@pytest.mark.parametrize("method", [m for m in DISTINCT if m not in BLIND])
def test_a_nan_example_ends_the_run_before_anything_is_released(method, tiny_bert, settings, setup_of, monkeypatch):
    """But for what was asked before anyone looked at losses: that is charged."""
    sees = any(
        isinstance(q, Gradients) or getattr(q, "at", ()) for q in first(built(setup_of, method).method, 0).values()
    )
    one = a_spec(method, tiny_bert, **fewer(method))
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
        assert record["privacy"]["steps_run"] == len(record["privacy"]["ledger"]) == (0 if sees else 1)


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
    record, _ = run.execute(a_spec(method, tiny_bert, head=head, batch_size=20, steps=2), settings, quiet)
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
    evaluation.evaluate(setup, Run(), 10)
    assert setup.prepared.model.calls > before

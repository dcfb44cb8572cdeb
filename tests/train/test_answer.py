"""The trip of a batch: which questions are refused, what is booked and drawn when, and what is clipped to what."""

import math
from contextlib import contextmanager

import pytest
import torch
from answer_cases import Bench, batch_of, gradient_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import trained

from dpft.harness.errors import BadInput, Diverged
from dpft.harness.query.queries import Beside, Gradients, Nothing, Values
from dpft.methods.clipping.base import ClippingRule

pytestmark = pytest.mark.usefixtures("one_thread")


def ones(seen):
    return torch.ones(len(seen.batch["x"]), 1)


def count(**more):
    return Values(**{"size": 1, "of": ones, "bound": 1.0, **more})


# --- which questions, and what is booked when


@pytest.mark.parametrize(
    "breaths, message",
    [
        ([{"gradint": Gradients()}], "'gradint', which `releases` does not declare"),
        ([{"gradient": Gradients(), "more": count()}], "'more', which `releases` does not declare"),
        ([{"gradient": Gradients()}, {"gradient": Gradients()}], "'gradient' twice in one step"),
        ([{"gradient": Gradients()}, {"count": count()}, {"count": count()}], "'count' twice in one step"),
        ([{"gradient": Gradients(), "second": Gradients()}], "one question for gradients"),
    ],
)
def test_questions_that_are_not_declared_or_asked_twice_are_refused(breaths, message):
    bench = Bench([batch_of(3)])
    ask = bench.answers("gradient", "second", "count")
    for queries in breaths[:-1]:
        ask(**queries)
    before = list(bench.happened)
    with pytest.raises(BadInput, match=message):
        ask(**breaths[-1])
    assert bench.happened == before, "nothing of a breath that is refused is answered"


def test_all_of_a_step_is_booked_once_and_before_the_first_draw():
    bench = Bench([batch_of(3), batch_of(2)], sigma=1.0)
    ask = bench.answers(vote=0.2, gradient=0.3, count=0.5)
    ask(vote=count())
    assert bench.happened == ["booked", "drawn"]
    ask(gradient=Gradients(), count=count())
    assert bench.happened == ["booked"] + ["drawn"] * 3
    ask.charge()
    assert bench.happened.count("booked") == 1


def test_what_is_never_asked_is_booked_when_the_step_ends():
    bench = Bench([batch_of(3)])
    ask = bench.answers(gradient=0.5, vote=0.5)
    ask.charge()
    assert ask.booked and bench.happened == ["booked"]


def test_answers_come_in_the_order_of_the_questions_with_their_own_noise_and_bound():
    bench = Bench([batch_of(3)], clip_norm=2.0, sigma=1.5)
    vote, gradient = bench.answers(gradient=0.75, vote=0.25)(vote=count(bound=0.5), gradient=Gradients())
    assert vote.clip_norm == 0.5 and vote.noise_multiplier == pytest.approx(3.0)
    assert vote.mean_noise_std == pytest.approx(1.5)
    assert gradient.clip_norm == 2.0 and gradient.noise_multiplier == pytest.approx(1.5 / 0.75**0.5)
    assert vote.values.shape == (1,) and set(gradient.tensors) == {"first.weight", "second.weight"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["values", "sparse", "points", "beside", "loss"])
def test_a_number_that_is_not_finite_ends_the_step_before_anything_is_booked(kind, bad):
    def of(seen):
        rows = torch.ones(len(seen.batch["x"]), 2)
        rows[seen.batch["number"] == 1] = bad
        return rows.to_sparse() if kind == "sparse" else rows

    values = Values(size=2, of=of, bound=1.0, at=[nothing_moves] if kind == "points" else ())
    queries = {"count": values}
    if kind == "beside":
        queries = {"gradient": Gradients(beside=Beside(size=2, of=of)), "count": count()}
    if kind == "loss":
        queries = {"gradient": Gradients(loss=lambda own: lambda model, batch: own(model, batch) * of_loss(batch, bad))}
    bench = Bench([batch_of(3), batch_of(1)], sigma=1.0)
    with pytest.raises(Diverged, match="not finite"):
        bench.answers("gradient", "count")(**queries)
    assert bench.happened == []


def of_loss(batch, bad):
    return torch.where(batch["number"] == 1, bad, 1.0)


# --- what is clipped to what


def test_numbers_are_cut_to_their_bound_and_a_wrong_shape_is_refused():
    bench = Bench([batch_of(3), batch_of(2)])
    lengths = Values(size=2, of=lambda seen: seen.batch["x"][:, :2], bound=0.7)
    (found,) = bench.answers("x")(x=lengths)
    rows = torch.cat([batch["x"][:, :2] for batch in bench.batches]).double()
    assert torch.allclose(
        found.values.double(), (rows * (0.7 / rows.norm(dim=1)).clamp_max(1)[:, None]).sum(0), rtol=1e-5
    )
    with pytest.raises(BadInput, match=r"return \[3, 2\]"):
        bench.answers("x")(x=Values(size=2, of=lambda seen: seen.batch["x"][:1, :2], bound=1.0))
    with pytest.raises(BadInput, match=r"return \[3, 2\]"):
        Bench([batch_of(3)]).answers()(gradient=Gradients(beside=Beside(size=2, of=ones)))


lengths = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    clip_norm=st.floats(0.1, 10.0),
    gradient=st.tuples(lengths, lengths),
    row=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
    groups=st.sampled_from(["flat", "layer", "mapping"]),
)
def test_gradient_and_numbers_beside_it_stay_in_one_ball(clip_norm, gradient, row, groups):
    """Exactly: the gradient is cut as it always is, the numbers to the room that it leaves."""
    batch = batch_of(1)
    for key, length in zip(("x", "y"), gradient, strict=True):
        batch[key] *= length / batch[key].norm()
    bound = {"first": 0.6 * clip_norm, "second": 0.8 * clip_norm} if groups == "mapping" else None
    bench = Bench([batch], clip_norm, "flat" if groups == "flat" else "layer")
    beside = Beside(size=3, of=lambda seen: torch.tensor([row], dtype=torch.float64))
    (noisy,) = bench.answers()(gradient=Gradients(bound=bound, beside=beside))
    first, second = (noisy.tensors[f"{name}.weight"].double().norm() for name in ("first", "second"))
    assert float(first**2 + second**2 + noisy.beside.double().square().sum()) <= clip_norm**2 * (1 + 1e-5)
    assert noisy.clip_norm == pytest.approx(clip_norm)
    limits = {"flat": None, "layer": (clip_norm / 2**0.5,) * 2, "mapping": (0.6 * clip_norm, 0.8 * clip_norm)}[groups]
    if limits is None:
        whole = math.hypot(*gradient)
        expected = [length * min(1.0, clip_norm / whole) for length in gradient]
    else:
        expected = [min(length, limit) for length, limit in zip(gradient, limits, strict=True)]
    assert [float(first), float(second)] == pytest.approx(expected, rel=1e-4)
    room = math.sqrt(max(0.0, clip_norm**2 - sum(length**2 for length in expected)))
    own = torch.tensor(row, dtype=torch.float64)
    kept = float(own.norm()) if float(own.norm()) <= room else room
    assert float(noisy.beside.double().norm()) == pytest.approx(kept, rel=1e-3, abs=2e-3 * clip_norm)


def test_numbers_beside_many_gradients_are_cut_one_by_one():
    batch = batch_of(40, scale=0.6)
    bench = Bench(
        [{key: value[:25] for key, value in batch.items()}, {key: value[25:] for key, value in batch.items()}]
    )
    (noisy,) = bench.answers()(gradient=Gradients(beside=Beside(size=1, of=lambda seen: 10 * ones(seen))))
    norms = gradient_norms(batch).square().sum(1).sqrt().clamp_max(1.0)
    assert 0 < float((norms < 1).double().mean()) < 1
    assert float(noisy.beside) == pytest.approx(float((1 - norms**2).sqrt().sum()), rel=1e-5)


def test_a_question_in_the_same_breath_sees_norms_and_one_in_another_does_not():
    batch, seen_lengths = batch_of(5), []

    def of(seen):
        seen_lengths.append((seen.lengths, seen.clipped))
        return ones(seen)

    for groups, lengths in (
        ("flat", gradient_norms(batch).square().sum(1, keepdim=True).sqrt()),
        ("layer", gradient_norms(batch)),
    ):
        bench = Bench([batch], 1.2, groups)
        ask = bench.answers("gradient", "count", "later")
        ask(gradient=Gradients(), count=count(of=of))
        before, after = seen_lengths.pop()
        assert torch.allclose(before.double(), lengths, rtol=1e-6)
        kept = lengths.clamp_max(1.2 / lengths.shape[1] ** 0.5)
        assert torch.allclose(after.double(), kept.square().sum(1).sqrt(), rtol=1e-6)
        ask(later=count(of=of))
        assert seen_lengths.pop() == (None, None)


def test_losses_are_those_of_the_gradients_and_are_computed_only_when_looked_at():
    batches, seen_losses = [batch_of(3), batch_of(2, seed=2)], []
    bench = Bench(batches)
    expected = [bench.model(b["x"], b["y"]).detach() for b in batches]

    def of(seen):
        seen_losses.append(seen.losses)
        return ones(seen)

    bench.answers("gradient", "count")(gradient=Gradients(), count=count(of=of))
    bench.model.modes.clear()
    bench.answers("count")(count=count(of=of))
    assert all(torch.equal(a, b) for a, b in zip(seen_losses, [*expected, *expected], strict=True))
    assert bench.model.modes == [(False, False)] * 2 and bench.model.training
    bench.model.modes.clear()
    bench.answers("count")(count=count())
    assert bench.model.modes == [], "no forward pass for what only counts"


def test_a_second_breath_looks_at_the_same_examples_again():
    bench, made = Bench(None), []

    def batches():
        made.append([batch_of(3), batch_of(2, seed=2)])
        return made[-1]

    ask = bench.answers("first", "second")
    ask._batches = batches
    sums = [
        ask(**{name: Values(size=4, of=lambda seen: seen.batch["x"], bound=9.0)})[0].values
        for name in ("first", "second")
    ]
    assert len(made) == 2 and torch.equal(*sums) and sums[0].any()


def test_nothing_is_noise_in_the_shapes_of_what_trains():
    bench = Bench([batch_of(3)], clip_norm=2.0, sigma=1.0)
    (noisy,) = bench.answers("nothing")(nothing=Nothing())
    assert noisy.clip_norm == 2.0 and {n: t.shape for n, t in noisy.tensors.items()} == {
        n: p.shape for n, p in bench.model.named_parameters()
    }
    assert all(t.any() for t in noisy.tensors.values()) and bench.model.modes == []


def test_what_is_left_out_contributes_nothing_and_gets_no_noise():
    batch = batch_of(6)
    bench = Bench([batch], 0.5)
    (noisy,) = bench.answers()(gradient=Gradients(only=frozenset({"second.weight"})))
    assert noisy.tensors["first.weight"].numel() == 0
    norms = gradient_norms(batch)[:, 1]
    expected = (batch["y"].double() * (0.5 / norms).clamp_max(1)[:, None]).sum(0)
    assert torch.allclose(noisy.tensors["second.weight"][0].double(), expected, rtol=1e-5)


# --- points


@contextmanager
def nothing_moves():
    yield


class Moved:
    """Points that add to the first matrix, and note when they are entered and left."""

    def __init__(self, model, distances):
        self.happened, self.points = [], [self._point(model, distance) for distance in distances]

    def _point(self, model, distance):
        @contextmanager
        def point():
            kept = model.first.weight.detach().clone()
            self.happened.append(f"enter {distance}")
            with torch.no_grad():
                model.first.weight.add_(distance)
            try:
                yield
            finally:
                self.happened.append(f"leave {distance}")
                with torch.no_grad():
                    model.first.weight.copy_(kept)

        return point


def test_points_are_entered_once_a_pass_and_every_microbatch_is_looked_at_inside():
    batches = [batch_of(3), batch_of(2, seed=2), batch_of(4, seed=3)]
    bench = Bench(batches)
    moved, before = Moved(bench.model, [0.5, -0.5, 2.0]), bench.model.first.weight.detach().clone()
    forward = bench.model.forward
    bench.model.forward = lambda x, y: (moved.happened.append(len(x)), forward(x, y))[1]
    rows = []

    def of(seen):
        rows.append(seen.losses)
        return seen.losses

    (found,) = bench.answers("values")(values=Values(size=3, of=of, bound=1e9, at=moved.points))
    assert moved.happened == [what for d in (0.5, -0.5, 2.0) for what in (f"enter {d}", 3, 2, 4, f"leave {d}")]
    assert set(bench.model.modes) == {(False, False)} and bench.model.training
    assert torch.equal(bench.model.first.weight, before)
    at = []
    for b in batches:
        second = b["y"] @ bench.model.second.weight[0].detach()
        at.append(torch.stack([b["x"] @ (before[0] + d) + second for d in (0.5, -0.5, 2.0)], 1))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rows, at, strict=True))
    assert torch.allclose(found.values, torch.cat(at).sum(0), atol=1e-4)


def test_a_model_that_was_in_evaluation_mode_stays_there_and_an_error_inside_a_point_restores_all():
    bench = Bench([batch_of(3)])
    moved, before = Moved(bench.model, [1.0]), bench.model.first.weight.detach().clone()
    bench.model.eval()
    ask = bench.answers("values", "other")
    ask(values=Values(size=1, of=lambda seen: seen.losses, bound=1.0, at=moved.points))
    assert not bench.model.training
    bench.model.train()
    bench.core.engine.loss = lambda model, batch: model(batch["x"], batch["y"]).sum()  # one loss for all
    with pytest.raises(BadInput, match="one loss per example"):
        ask(other=Values(size=1, of=lambda seen: seen.losses, bound=1.0, at=moved.points))
    assert bench.model.training and torch.equal(bench.model.first.weight, before)


def test_points_gradients_and_numbers_in_one_breath_are_answered_each_as_alone():
    batches = [batch_of(3), batch_of(2, seed=2)]
    questions = {
        "gradient": lambda moved: Gradients(),
        "count": lambda moved: count(of=lambda seen: seen.batch["x"][:, :1]),
        "values": lambda moved: Values(size=2, of=lambda seen: seen.losses, bound=1.0, at=moved.points),
    }
    bench = Bench(batches)
    moved = Moved(bench.model, [0.5, -0.5])
    together = bench.answers(*questions)(**{name: make(moved) for name, make in questions.items()})
    for (name, make), found in zip(questions.items(), together, strict=True):
        (alone,) = bench.answers(*questions)(**{name: make(moved)})
        assert all(torch.equal(alone.tensors[key], found.tensors[key]) for key in alone.tensors), name


# --- clipping rules


class Learning(ClippingRule):
    """Asks for a count beside the gradient whose bound it leaves as it is, and hears both answers."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def amend(self, gradient):
        return gradient, {"count": count()}

    def learn(self, gradient, beside):
        self.heard.append((gradient, beside))


def test_a_rule_hears_the_answers_to_its_own_questions_and_the_method_only_its_own():
    rule = Learning()
    bench = Bench([batch_of(3), batch_of(2)], rule=rule)
    answers = bench.answers("vote", "gradient", "count")(vote=count(bound=0.5), gradient=Gradients())
    assert len(answers) == 2 and float(answers[0].values) == 2.5
    ((gradient, beside),) = rule.heard
    assert gradient is answers[1] and set(beside) == {"count"} and float(beside["count"].values) == 5.0


def test_a_rule_does_not_answer_a_methods_question_with_its_own():
    bench = Bench([batch_of(3)], rule=Learning())
    with pytest.raises(BadInput, match="count"):
        bench.answers("gradient", "count")(gradient=Gradients(), count=count(bound=7.0))


def test_a_kind_of_question_that_is_not_listed_is_refused(setup_of, monkeypatch):
    from dpft.harness.query.queries import Values
    from dpft.harness.runs import registry

    monkeypatch.setattr(registry.method("dp-sgd"), "asks", (Values,))
    with pytest.raises(BadInput, match="`asks` does not list"):
        trained(setup_of("dp-sgd"))

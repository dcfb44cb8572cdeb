"""A bound for each clipping group: by hand in float64, in every engine, with what is told about it afterwards."""

import math

import pytest
import torch
from engine_cases import assert_same, batch_for, clipped, loss, model_for, no_clock

from dpft.harness.engine import NAMES, engine_class
from dpft.harness.engine.agreement import check, compare
from dpft.harness.engine.base import PlainEngine, RunningSums, zero_sums
from dpft.harness.engine.clipping import FUNCTIONS, Clipping
from dpft.harness.errors import CannotRun
from dpft.harness.query.encoding import Encoding

GROUPS = ("flat", "block", "layer")
ALL = [engine_class(name) for name in NAMES]
FACTORED, REFERENCE = (
    engine_class("factored"),
    engine_class("reference"),
)  # the latter has no hooks: to ask about groups
NOTHING = Encoding(left=torch.zeros(0, dtype=torch.long))


def engine_of(kind, model, groups="block", function="abadi"):
    return kind(model, loss, dict(model.named_parameters()), no_clock, Clipping(function, groups))


def uneven(engine, unit=0.2):
    """Some groups clip every example, others none."""
    return {group: unit * 30.0 ** ((i % 3) - 1) for i, group in enumerate(engine.groups)}


def gradients(model, batch):
    """By example: plain gradients by name."""
    names = dict(model.named_parameters())
    for i in range(len(batch["labels"])):
        value = loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0]
        yield dict(zip(names, torch.autograd.grad(value, list(names.values())), strict=True))


def length(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def accumulated(engine, batch, bound, encodings=None):
    total = zero_sums(engine.parameters, encodings or {})
    try:
        return total, *engine.accumulate(batch, total, bound, encodings or {})
    finally:
        engine.close()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ALL)
def test_every_group_is_clipped_to_its_own_bound(kind, groups):
    model, batch = model_for("bert"), batch_for("bert")
    engine = engine_of(REFERENCE, model, groups)
    bound = uneven(engine)
    expected, norms, lengths = zero_sums(engine.parameters, {}), [], []
    for gradient in gradients(model, batch):
        norms.append([length(gradient[n] for n in names) for names in engine.members.values()])
        factors = [min(1.0, bound[g] / norm) for g, norm in zip(engine.groups, norms[-1], strict=True)]
        lengths.append(math.sqrt(sum((f * n) ** 2 for f, n in zip(factors, norms[-1], strict=True))))
        for factor, names in zip(factors, engine.members.values(), strict=True):
            for name in names:
                expected[name] += factor * gradient[name]
    norms, lengths = (torch.tensor(values, dtype=torch.float64) for values in (norms, lengths))
    found, _, found_norms = accumulated(engine_of(kind, model, groups), batch, bound)
    assert_same(found, expected, 1e-10)
    torch.testing.assert_close(found_norms, norms, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(engine.clipped(found_norms, bound), lengths, rtol=1e-10, atol=0)
    whole = math.sqrt(sum(c**2 for c in bound.values()))
    assert engine.ball(bound) == pytest.approx(whole) and lengths.max() <= whole * (1 + 1e-9)
    over = (norms > norms.new_tensor([bound[g] for g in engine.groups])).any(1)
    assert torch.equal(engine.overall(found_norms, bound) > whole, over)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_bound_is_divided_alike(function):
    model, batch = model_for("bert"), batch_for("bert")
    engine = engine_of(FACTORED, model, "layer", function)
    alike = dict.fromkeys(engine.groups, 0.3 / math.sqrt(len(engine.groups)))
    found, _, norms = accumulated(engine, batch, 0.3)
    expected, *_ = accumulated(engine_of(FACTORED, model, "layer", function), batch, alike)
    assert_same(found, expected, 1e-12)
    assert engine.ball(0.3) == 0.3 == pytest.approx(engine.ball(alike))
    for told in (engine.overall, engine.clipped):
        torch.testing.assert_close(told(norms, 0.3), told(norms, alike), rtol=1e-12, atol=0)
    torch.testing.assert_close(engine.overall(norms, 0.3), norms.amax(1) * math.sqrt(len(engine.groups)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", ALL)
def test_the_length_that_is_told_is_that_of_what_one_example_adds(kind, function):
    model, batch = model_for("bert", torch.float32), batch_for("bert")
    engine = engine_of(REFERENCE, model, function=function)
    for bound in (0.2, uneven(engine)):
        for i in range(3):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            total, _, norms = accumulated(engine_of(kind, model, function=function), one, bound)
            assert float(engine.clipped(norms, bound)) == pytest.approx(length(total.values()), rel=1e-5)
            assert length(total.values()) <= engine.ball(bound) * (1 + 1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_infinite_bound_clips_nothing(function):
    model, batch = model_for("bert"), batch_for("bert")
    engine = engine_of(FACTORED, model, function=function)
    expected = {n: sum(g[n] for g in gradients(model, batch)) for n in engine.parameters}
    for bound in (math.inf, dict.fromkeys(engine.groups, math.inf)):
        found, _, norms = accumulated(engine_of(FACTORED, model, function=function), batch, bound)
        assert_same(found, expected, 1e-10)
        assert torch.isfinite(engine.overall(norms, bound)).all()
        torch.testing.assert_close(engine.clipped(norms, bound), norms.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_a_group_of_which_nothing_is_asked_counts_as_zero(kind):
    model, batch = model_for("bert"), batch_for("bert")
    engine = engine_of(REFERENCE, model)
    _, _, whole = accumulated(engine_of(kind, model), batch, 0.5)
    quiet = engine.groups[1]
    encodings = dict.fromkeys(engine.members[quiet], NOTHING)
    for bound in (0.5, uneven(engine)):
        total, _, norms = accumulated(engine_of(kind, model), batch, bound, encodings)
        assert all(total[name].numel() == 0 for name in engine.members[quiet])
        assert torch.equal(norms[:, 1], torch.zeros(5).double()) and torch.isfinite(engine.clipped(norms, bound)).all()
        kept = [i for i in range(len(engine.groups)) if i != 1]
        torch.testing.assert_close(norms[:, kept], whole[:, kept], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ALL)
def test_a_pass_that_asks_for_no_gradient_has_losses_and_norms_of_zero(kind):
    model, batch = model_for("bert"), batch_for("bert")
    encodings = dict.fromkeys(dict(model.named_parameters()), NOTHING)
    total, losses, norms = accumulated(engine_of(kind, model), batch, 0.5, encodings)
    assert sum(t.numel() for t in total.values()) == 0 and not norms.any() and norms.shape[0] == 5
    torch.testing.assert_close(losses, loss(model, batch).detach())


@pytest.mark.parametrize("kind", [*ALL, PlainEngine])
@pytest.mark.parametrize("groups", GROUPS)
def test_norms_come_by_group(kind, groups):
    model, batch = model_for("bert"), batch_for("bert")
    engine = engine_of(kind, model, groups)
    assert engine.groups == tuple(Clipping(groups=groups).grouped(engine.parameters))
    losses, norms = engine.accumulate(batch, RunningSums(engine.parameters, {}), 0.5, {})
    engine.close()
    assert losses.shape == (5,) and norms.shape == (5, len(engine.groups))


@pytest.mark.parametrize("kind", ALL)
def test_bounds_that_do_not_fit_the_groups_are_refused(kind):
    model, batch = model_for("bert"), batch_for("bert")
    bound = uneven(engine_of(REFERENCE, model))
    group = next(iter(bound))
    missing = {g: c for g, c in bound.items() if g != group}
    for wrong, message in (
        (missing, f"group '{group}' has no bound"),
        ({**bound, "elsewhere": 1.0}, "group 'elsewhere' does not exist"),
        ({**bound, group: 0.0}, f"group '{group}' is 0.0; it must be above 0"),
        ({**bound, group: math.nan}, "must be above 0"),
        (-1.0, "must be above 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            accumulated(engine_of(kind, model), batch, wrong)
        with pytest.raises(RuntimeError, match=message):
            engine_of(REFERENCE, model).ball(wrong)


@pytest.mark.parametrize("kind", ALL)
def test_agreement_holds_with_a_bound_for_each_group(kind):
    model, batch = model_for("bert", torch.float32), batch_for("bert")
    engine = engine_of(kind, model)
    for bound in (0.2, uneven(engine)):
        check(engine, batch, {}, bound)
    losses, norms = engine.accumulate(batch, RunningSums(engine.parameters, {}), uneven(engine), {})
    compare(engine, batch, {}, uneven(engine), None, False, losses, norms)
    for group in range(len(engine.groups)):
        wrong = norms.clone()
        wrong[2, group] *= 1.2  # of one example, in one group
        with pytest.raises(CannotRun, match="another gradient"):
            compare(engine, batch, {}, uneven(engine), None, False, losses, wrong)
    engine.close()


def test_a_bound_of_another_group_is_seen_by_the_comparison(monkeypatch):
    """Every group is clipped to the largest bound."""
    model, batch = model_for("bert", torch.float32), batch_for("bert")
    engine = engine_of(FACTORED, model)
    bound, settle = uneven(engine), FACTORED._settle

    def swapped(self, group):
        self._pass.bounds = dict.fromkeys(self.groups, (max(bound.values()), 1))
        return settle(self, group)

    monkeypatch.setattr(FACTORED, "_settle", swapped)
    with pytest.raises(CannotRun, match="clipped sum"):
        check(engine, batch, {}, bound)
    engine.close()


def test_flat_norms_are_one_column():
    *_, norms = clipped("factored", model_for("bert"), batch_for("bert"))
    assert norms.shape == (5, 1)

"""Clipping per-layer: each group's threshold by its own count, the whole at C, and what the engine and a run make of it."""

import dataclasses
import math

import pytest
import torch
from rule_cases import B, ball, seen, started, step
from small_runs import quiet, trained

from dpft.harness.engine import engine_class
from dpft.harness.errors import BadInput
from dpft.harness.query.encoding import Encoding
from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.query.queries import Gradients
from dpft.harness.runs import resolve
from dpft.harness.train import loop

THREE = {"a": ["a.weight", "a.bias"], "b": ["b.weight"], "c": ["c.weight"]}
MEDIANS = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)


def released(values, groups=3):
    return {"counts": NoisySum({VALUES: torch.tensor(values)}, 1.0, math.sqrt(groups) / 2, B)}


def test_thresholds_move_by_their_formula_and_bounds_are_rescaled_to_c():
    rule = started("per-layer", groups=THREE, clip_norm=6.0, clip_rate=0.3, target_quantile=0.6, count_share=0.04)
    assert rule.shares() == {"counts": 0.04}
    gradient, more = rule.amend(Gradients(only=None))
    each = 6 / math.sqrt(3)
    assert gradient.bound == pytest.approx(dict.fromkeys("abc", each)) and list(gradient.bound) == list("abc")
    question = more["counts"]
    assert (question.size, question.bound) == (3, math.sqrt(3) / 2)
    rows = question.of(seen([[0.0, each * 0.9, each * 1.1], [9.0, 9.0, 9.0]], gradient.bound))
    assert rows.tolist() == [[0.5, 0.5, -0.5], [-0.5, -0.5, -0.5]]
    rule.learn(None, released([0.1, -0.3, 0.9]))  # shares 0.6, 0.2 and 1.4, which is cut to 1
    t = [each * math.exp(-0.3 * (share - 0.6)) for share in (0.6, 0.2, 1.0)]
    assert list(rule.thresholds.values()) == pytest.approx(t)
    gradient, more = rule.amend(Gradients())
    assert list(gradient.bound.values()) == pytest.approx([6 * x / math.hypot(*t) for x in t])
    assert ball(gradient.bound) == pytest.approx(6.0, rel=1e-14)
    on_edge = seen([[x * (1 + 1e-5) for x in t]], gradient.bound)  # held against thresholds, not bounds
    assert more["counts"].of(on_edge).tolist() == [[-0.5, -0.5, -0.5]]


@pytest.mark.parametrize("total", ["fixed", "quantiles"])
@pytest.mark.parametrize("clip_norm", [30 / 30, 30.0, 30.0 * 30])
def test_bounds_take_the_proportions_of_the_layers_whatever_the_whole(total, clip_norm):
    """Also where C is so wrong that all gradients are cut, or none: thresholds are held against norms, not bounds."""
    rule = started("per-layer", groups=THREE, clip_norm=clip_norm, total=total, clip_least=1e-6)
    torch.manual_seed(0)
    for _ in range(120):
        step(rule, MEDIANS * torch.exp(0.3 * torch.randn(B, 3, dtype=torch.float64)))
        if total == "fixed":
            assert ball(rule.bounds) == pytest.approx(clip_norm, rel=1e-12)
    bounds = torch.tensor(list(rule.bounds.values()), dtype=torch.float64)
    found = bounds / MEDIANS if total == "quantiles" else bounds / bounds[2] / MEDIANS * MEDIANS[2]
    assert bool(((found - 1).abs() < 0.25).all()), found
    assert rule.clip_norm == pytest.approx(clip_norm if total == "fixed" else math.hypot(*rule.thresholds.values()))


def test_counts_of_an_empty_batch_are_zero_and_noise_has_the_joint_bound():
    rule = started("per-layer", groups=THREE, clip_norm=1.0)
    step(rule, torch.zeros(0, 3), sigma=0.0)  # released 0: a share of one half, which is the target
    assert rule.thresholds == pytest.approx(dict.fromkeys("abc", 1 / math.sqrt(3)))
    step(rule, torch.zeros(B, 3), sigma=0.0)  # an example that is there and has no gradient is within
    assert max(rule.thresholds.values()) < 0.55


def test_groups_of_which_nothing_is_asked_are_not_counted_and_stay():
    rule = started("per-layer", groups=THREE, clip_norm=1.0)
    nothing = Encoding(left=torch.zeros(0, dtype=torch.int64))
    for question, counted in (
        (Gradients(only=frozenset({"a.bias", "c.weight"})), "ac"),
        (Gradients(encodings={"b.weight": nothing}), "ac"),
        (Gradients(encodings={"a.bias": nothing}), "abc"),  # a.weight is asked for
        (Gradients(encodings={"b.weight": Encoding(right=torch.ones(4, 2))}), "abc"),
    ):
        gradient, more = rule.amend(question)
        assert set(gradient.bound) == set("abc") and more["counts"].bound == math.sqrt(len(counted)) / 2
        assert more["counts"].size == len(counted)
    _, more = rule.amend(Gradients(only=frozenset({"b.weight"})))
    assert more["counts"].of(seen([[9.0, 0.1, 9.0]], 1.0)).tolist() == [[0.5]]
    rule.learn(None, released([0.5], 1))
    assert rule.thresholds["a"] == rule.thresholds["c"] == 1 / math.sqrt(3) > rule.thresholds["b"]
    gradient, more = rule.amend(Gradients(only=frozenset()))
    assert more == {}
    rule.learn(None, {})


def test_a_resumed_rule_has_the_thresholds():
    rule, again = (started("per-layer", groups=THREE, clip_norm=2.0, total="quantiles") for _ in range(2))
    torch.manual_seed(0)
    for _ in range(3):
        step(rule, MEDIANS.expand(B, 3))
    again.load_state_dict(rule.state_dict())
    assert again.thresholds == rule.thresholds and again.bounds == rule.bounds and again.clip_norm == rule.clip_norm


@pytest.mark.parametrize("engine", ["factored", "reference", "opacus"])
def test_in_a_run_every_layer_is_cut_to_its_own_bound_and_counted_by_its_own_norms(setup_of, monkeypatch, engine):
    """The sums of the third step are those of autograd on each example alone, cut layer by layer; under every engine."""
    setup = setup_of("dp-adam", clipping="per-layer", clip_groups="layer", clip_norm=0.5, clip_rate=1.0, head="native")
    own = engine_class(engine)(
        setup.prepared.model, setup.engine.loss, setup.parameters, setup.clock, setup.engine.clipping
    )
    setup, rule, seen_ = dataclasses.replace(setup, engine=own), setup.method.rule, []
    setup.sampler.sample = lambda: [3, 4, 9]
    kept = loop.StepWatcher.summed

    def summed(self, name, query, total, found):
        weights = {n: p.detach().clone() for n, p in setup.parameters.items()}
        sums = {n: t.double().clone() for n, t in total.items()}
        seen_.append((name, sums, weights, dict(rule.thresholds), dict(rule.bounds)))
        kept(self, name, query, total, found)

    monkeypatch.setattr(loop.StepWatcher, "summed", summed)
    trained(setup, quiet)
    own.close()
    assert [name for name, *_ in seen_] == ["gradient", "counts"] * 4
    found, counted, (weights, thresholds, bounds) = seen_[4][1], seen_[5][1][VALUES], seen_[4][2:]
    assert max(bounds.values()) > 2 * min(bounds.values()) and ball(bounds) == pytest.approx(0.5, rel=1e-12)
    with torch.no_grad():
        for n, p in setup.parameters.items():
            p.copy_(weights[n])
    setup.prepared.model.eval()
    sums, counts = (
        {n: torch.zeros_like(p).double() for n, p in setup.parameters.items()},
        torch.zeros(len(bounds)).double(),
    )
    for i in (3, 4, 9):
        loss = setup.engine.loss(setup.prepared.model, setup.prepared.collate([setup.prepared.train[i]]))[0]
        gradients = dict(zip(setup.parameters, torch.autograd.grad(loss, list(setup.parameters.values())), strict=True))
        for j, (group, names) in enumerate(setup.engine.members.items()):
            norm = math.sqrt(sum(float(gradients[n].double().square().sum()) for n in names))
            counts[j] += 0.5 if norm <= thresholds[group] else -0.5
            for n in names:
                sums[n] += gradients[n].double() * min(1.0, bounds[group] / max(norm, 1e-30))
    for n, expected in sums.items():
        assert torch.allclose(found[n], expected, rtol=1e-3, atol=1e-6), n
    assert torch.equal(counted, counts) and 1 < int((counts > 0).sum()) < len(counts) - 1, "all alike would test little"


def test_bad_choices_are_one_sentence():
    def resolved(**more):
        return resolve.resolve({"task": "sst2", "method": "dp-adam", "clipping": "per-layer", **more})

    with pytest.raises(BadInput, match="clip_groups=flat is one group; set clip_groups to layer or block"):
        resolved()
    with pytest.raises(BadInput, match="certified for Gaussian noise alone"):
        resolved(clip_groups="layer", mechanism="laplace")
    with pytest.raises(BadInput, match="did you mean 'fixed'"):
        resolved(clip_groups="layer", total="fix")
    assert resolved(clip_groups="block").clipping == "per-layer"

"""DPlis and DP-SAT: at which weights they take the loss, and that one example's gradient of all of them is clipped once."""

import copy

import pytest
import torch
from asking import answered, first
from small_runs import silent
from torch import nn

from dpft.harness.engine import engine_class
from dpft.harness.engine.agreement import check
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.probes import Clock
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.body, self.out = nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.table.weight  # tied weights must move together

    def forward(self, x):
        return self.out(torch.tanh(self.body(self.norm(self.table(x))))).mean(1)


def objective(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def made(name, optimizer="adam", **options):
    torch.manual_seed(0)
    model = Small().double()
    method = registry.make(name, "mean", options)
    method.spec = resolve({"task": "sentences", "method": name, "optimizer": optimizer, "lr": 0.01})
    method.prepare(model, torch.Generator().manual_seed(5))
    batch = {"x": torch.randint(0, 7, (5, 4)), "y": torch.randint(0, 7, (5,))}
    return model, method, batch


def release(model, std=1.0):
    torch.manual_seed(3)
    tensors = {name: std * torch.randn_like(p) for name, p in model.named_parameters()}
    return NoisySum(tensors, 2.0, 0.5, 4)  # noise of one entry of the mean: 0.25


def moved(method, step):
    return [{name: w.detach() for name, w in weights.items()} for weights in method.points(step)]


def by_hand(model, batch, points, clip_norm):
    """The clipped sum of each example's gradient of the mean over these weights, each set of them in a copy of the model."""
    total, norms = 0.0, []
    for i in range(len(batch["x"])):
        one, found = {key: value[i : i + 1] for key, value in batch.items()}, 0.0
        for weights in points:
            other = copy.deepcopy(model)
            with torch.no_grad():
                for name, p in other.named_parameters():
                    p.copy_(weights[name])
            gradient = torch.autograd.grad(objective(other, one).sum(), list(other.parameters()))
            found = found + torch.cat([g.flatten() for g in gradient]) / len(points)
        norms.append(float(found.norm()))
        total = total + found * min(1.0, clip_norm / norms[-1])
    return total, sorted(norms)


@pytest.mark.parametrize("engine", ["factored", "reference"])
@pytest.mark.parametrize("name, options", [("dplis", {"samples": 3, "radius": 30.0}), ("dp-sat", {"ascent": 0.5})])
def test_one_example_is_asked_for_the_mean_over_the_points_and_clipped_once(name, options, engine):
    model, method, batch = made(name, **options)
    answered(method, 0, release(model))
    question, points = first(method, 1)["gradient"], moved(method, 1)
    assert len(points) == options.get("samples", 1)
    clip_norm = by_hand(model, batch, points, 1.0)[1][2]
    expected, _ = by_hand(model, batch, points, clip_norm)
    plain, _ = by_hand(model, batch, [dict(model.named_parameters())], clip_norm)
    assert (plain - expected).norm() > 1e-2 * expected.norm(), "weights that lie too near tell nothing"
    one = engine_class(engine)(model, objective, dict(model.named_parameters()), Clock(torch.device("cpu")))
    total = zero_sums(one.parameters, {})
    with one.under(question.loss):
        for part in (slice(0, 2), slice(2, 5)):  # every microbatch at the same weights
            one.accumulate({key: value[part] for key, value in batch.items()}, total, clip_norm, {})
        check(one, batch, {}, clip_norm)
    one.close()
    assert (torch.cat([t.flatten() for t in total.values()]) - expected).norm() <= 1e-10 * expected.norm()


def test_opacus_says_that_it_cannot():
    model, method, batch = made("dp-sat")
    answered(method, 0, release(model))
    engine = engine_class("opacus")(model, objective, dict(model.named_parameters()), Clock(torch.device("cpu")))
    with (
        pytest.raises(CannotRun, match="Opacus takes no gradients at other weights"),
        engine.under(first(method, 1)["gradient"].loss),
    ):
        engine.accumulate(batch, zero_sums(engine.parameters, {}), 1.0, {})
    engine.close()


@pytest.mark.parametrize("name", ["dplis", "dp-sat"])
def test_the_first_step_is_that_of_dp_adam_and_no_weight_is_touched(name):
    model, method, _ = made(name)
    before = [p.detach().clone() for p in model.parameters()]
    assert first(method, 0)["gradient"].loss is None
    noisy = release(model)
    kept = {n: t.clone() for n, t in noisy.tensors.items()}
    update = answered(method, 0, noisy)
    assert all(torch.equal(update[n], kept[n]) for n in kept)
    moved(method, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer, one_step", [("adam", 0.01), ("sgd", 0.01 * 0.25)])
def test_dplis_goes_as_far_as_the_noise_of_a_few_releases(optimizer, one_step):
    """lr multiplies means here, so the noise is that of the mean; std = 20 lr sigma C of the paper's code is of sums."""
    model, method, _ = made("dplis", optimizer, samples=200)
    answered(method, 0, release(model))
    for name, p in model.named_parameters():
        away = torch.stack([weights[name] - p.detach() for weights in moved(method, 1)])
        assert float(away.std()) == pytest.approx(20 * one_step, rel=0.05)
        assert float(away.mean()) == pytest.approx(0, abs=20 * one_step * 5 / away.numel() ** 0.5)


def test_dplis_draws_public_weights_anew_in_every_step_and_the_same_after_a_resume():
    model, method, _ = made("dplis", samples=2)
    answered(method, 0, release(model))
    other = made("dplis", samples=2)[1]
    other.load_state_dict(method.state_dict())
    a, b, later = moved(method, 1), moved(other, 1), moved(method, 2)
    assert all(torch.equal(a[k][n], b[k][n]) for k in range(2) for n in a[0])
    assert not any(torch.equal(a[k][n], x[n]) for k, x in ((0, a[1]), (0, later[0])) for n in a[0])


def test_dplis_takes_the_mean_and_not_the_sum():
    """At radius 0 it is the gradient itself, also above the bound: a sum would be clipped three times as hard."""
    model, method, batch = made("dplis", samples=3, radius=0.0)
    answered(method, 0, release(model))
    here = [dict(model.named_parameters())]
    clip_norm = by_hand(model, batch, here, 1.0)[1][2]
    engine = engine_class("factored")(model, objective, dict(model.named_parameters()), Clock(torch.device("cpu")))
    total = zero_sums(engine.parameters, {})
    with engine.under(first(method, 1)["gradient"].loss):
        engine.accumulate(batch, total, clip_norm, {})
    expected, _ = by_hand(model, batch, here, clip_norm)
    assert torch.allclose(torch.cat([t.flatten() for t in total.values()]), expected, rtol=1e-9)


def test_dp_sat_goes_that_far_up_along_the_last_release():
    model, method, _ = made("dp-sat", ascent=0.2)
    for step in range(2):
        noisy = release(model, std=1.0 + step)
        kept = {n: t.clone() for n, t in noisy.tensors.items()}
        update = answered(method, step, noisy)
        for u in update.values():
            u.zero_()  # what becomes of the update is no business of the release that is kept
        (there,) = moved(method, step + 1)
        away = torch.cat([(there[n] - p.detach()).flatten() for n, p in model.named_parameters()])
        along = torch.cat([t.flatten() for t in kept.values()])
        assert float(away.norm()) == pytest.approx(0.2, rel=1e-9)
        assert float(away @ along / along.norm()) == pytest.approx(0.2, rel=1e-9)


def test_dp_sat_stays_where_a_release_says_nothing():
    model, method, _ = made("dp-sat")
    answered(method, 0, silent(4).release({n: torch.zeros_like(p) for n, p in model.named_parameters()}))
    (there,) = moved(method, 1)
    assert all(torch.equal(there[n], p) for n, p in model.named_parameters())


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(BadInput, match="samples must be"):
        resolve({"task": "sentences", "method": "dplis", "samples": 0})
    with pytest.raises(BadInput, match="ascent must be"):
        resolve({"task": "sentences", "method": "dp-sat", "ascent": -1.0})

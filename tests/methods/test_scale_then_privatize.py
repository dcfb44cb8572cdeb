"""Scale-then-privatize: what D is, what is clipped, and that without noise and clipping it is Adam."""

import math

import pytest
import torch
from asking import answered, encodings_of, first
from small_runs import silent
from torch import nn

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput
from dpft.harness.probes import Clock
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve

SHAPES = {"weight": (5, 4), "bias": (5,)}
S = 0.25  # noise of one entry of the mean: sigma C/B = 2 * 0.5 / 4


def made(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 5).double()
    method = registry.make("scale-then-privatize", "mean", options)
    method.prepare(model, torch.Generator())
    method.preconditions = True
    return model, method


def release(tensors):
    return NoisySum({name: t.clone() for name, t in tensors.items()}, 2.0, 0.5, 4)


def draws(std=1.0):
    return {name: std * torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def test_three_steps_by_hand():
    _, method = made(prior=3.0)
    m = {name: 0.0 for name in SHAPES}
    v = {name: 0.0 for name in SHAPES}
    for t in range(1, 4):
        asked = first(method, t - 1)["gradient"].encodings
        if t == 1:
            assert asked == {}
            d = {name: 1.0 for name in SHAPES}
        else:
            n = (1 - 0.999 ** (t - 1)) / 0.001
            u = {name: v[name] / (1 - 0.999 ** (t - 1)) + 3.0 / n * S**2 for name in SHAPES}
            mean = torch.cat([x.flatten() for x in u.values()]).mean()
            d = {name: (mean / x).sqrt() for name, x in u.items()}
            for name in SHAPES:
                torch.testing.assert_close(asked[name].weights, d[name], rtol=1e-9, atol=0)
        released = draws(S)
        update = answered(method, t - 1, release(released))
        for name in SHAPES:
            g = released[name] / d[name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            expected = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            torch.testing.assert_close(update[name], expected, rtol=1e-9, atol=1e-12)


def test_the_noise_keeps_its_energy_and_an_example_shaped_like_the_second_moment_its_norm():
    _, method = made(prior=1e-6)
    released = draws(10.0)
    answered(method, 0, release(released))
    weights = torch.cat(
        [e.weights.flatten() for e in encodings_of(method, dict(made()[0].named_parameters()), 1).values()]
    )
    example = torch.cat([t.flatten() for t in released.values()])
    assert float((1 / weights.square()).mean()) == pytest.approx(1, rel=1e-6)
    assert float((weights * example).norm()) == pytest.approx(float(example.norm()), rel=1e-4)
    assert float(weights.max()) > 3 * float(weights.min())


def test_what_is_small_by_chance_is_not_given_less_noise():
    """After one release of noise alone; with the constant of others' code single draws decide."""
    torch.manual_seed(1)
    most = {}
    for prior in (10.0, 1e-6):
        _, method = made(prior=prior)
        answered(method, 0, release(draws(S)))
        most[prior] = max(float(w.max()) for w in method.weights(1).values())
    assert most[10.0] < 1.1 and most[1e-6] > 4


def test_an_example_is_cut_in_the_coordinates_of_d_and_may_be_longer_outside_of_them():
    """One example adds exactly C to what is released. What the method makes of it is no release, and may be longer than C."""
    model, method = made(prior=1e-6)
    shaped = {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    shaped["weight"][:, 0] = shaped["bias"][:] = 10
    answered(method, 0, release(shaped))
    question = first(method, 1)["gradient"]
    engine = engine_class("factored")(
        model, lambda m, b: m(b["x"]).square().sum(1), dict(model.named_parameters()), Clock(torch.device("cpu"))
    )
    total = zero_sums(engine.parameters, question.encodings)
    engine.accumulate({"x": torch.tensor([[100.0, 0, 0, 0]]).double()}, total, 0.5, question.encodings)
    assert math.sqrt(sum(float(t.square().sum()) for t in total.values())) == pytest.approx(0.5, rel=1e-9)
    outside = {name: t / question.encodings[name].weights for name, t in total.items()}
    assert math.sqrt(sum(float(t.square().sum()) for t in outside.values())) > 0.7


def test_without_noise_and_clipping_it_is_adam_also_where_nothing_was_ever_released():
    model, method = made()
    twin = nn.Linear(4, 5).double()
    twin.load_state_dict(model.state_dict())
    adam, mechanism = torch.optim.Adam(twin.parameters(), lr=0.01), silent(3)
    x = torch.randn(3, 4).double() * torch.tensor([1.0, 1.0, 1e-3, 0.0])  # the last column has no gradient
    for step in range(6):
        engine = engine_class("factored")(
            model, lambda m, b: m(b["x"]).square().sum(1), dict(model.named_parameters()), Clock(torch.device("cpu"))
        )
        question = first(method, step)["gradient"]
        total = zero_sums(engine.parameters, question.encodings)
        engine.accumulate({"x": x}, total, 1e9, question.encodings)
        engine.close()
        update = answered(method, step, mechanism.release(total, 1e9))
        adam.zero_grad()
        twin(x).square().sum(1).mean().backward()
        adam.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(0.01 * update[name])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_with_sgd_the_release_over_d_is_handed_on():
    _, method = made()
    method.preconditions = False
    answered(method, 0, release(draws()))
    d, released = method.weights(1), draws()
    update = answered(method, 1, release(released))
    for name, w in d.items():
        torch.testing.assert_close(update[name], released[name] / w)


def test_it_takes_no_decoder_and_no_prior_of_nothing():
    with pytest.raises(BadInput, match="has noise of another size in every entry"):
        resolve({"task": "sentences", "method": "scale-then-privatize", "decoder": "adambc"})
    with pytest.raises(BadInput, match="prior must be"):
        resolve({"task": "sentences", "method": "scale-then-privatize", "prior": 0.0})

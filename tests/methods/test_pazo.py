"""pazo: public gradients beside, or around, what dp-zo releases; the release itself is dp-zo's."""

import math

import pytest
import torch
from torch import nn
from zeroth_cases import Listening, Slopes, linear, method_for, step

from dpft.harness.errors import BadInput
from dpft.harness.query.public import Public
from dpft.harness.runs.resolve import resolve

SIZE = 40
PUBLIC = torch.randn(32, SIZE, generator=torch.Generator().manual_seed(8)).double()
PRIVATE = torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(2)).double()

pytestmark = pytest.mark.usefixtures("one_thread")


def public():
    def collate(examples):
        return {"x": torch.stack([example["x"] for example in examples])}

    return Public([{"x": row} for row in PUBLIC], collate, linear, torch.device("cpu"))


def pazo(model, **options):
    return method_for(model, name="pazo", public=public(), public_batch=4, **options)


def basis(number, count):
    """Orthonormal, of the means of `count` public batches: those of the step with that number."""
    rows = PUBLIC.view(8, 4, SIZE).mean(1)[[(number * count + j) % 8 for j in range(count)]]
    return torch.linalg.qr(rows.T).Q


@pytest.mark.parametrize("count", [1, 3])
def test_without_weight_for_the_public_gradient_it_is_dp_zo(count):
    model, batch = Slopes(SIZE), {"x": PRIVATE[0]}
    more = {"number": 5, "sigma": 1.5, "batch_size": 4, "noise": 3}
    expected, values = step(model, method_for(model, directions=count), linear, [batch], **more)
    found, same = step(model, pazo(model, directions=count, public_weight=0.0), linear, [batch], **more)
    assert torch.equal(values, same)
    aligned = math.sqrt(count / SIZE)
    torch.testing.assert_close(found["weight"], aligned * expected["weight"], rtol=1e-5, atol=1e-7, check_dtype=False)


def test_the_public_gradient_is_mixed_in_at_its_own_length():
    model, batch = Slopes(SIZE), {"x": PRIVATE[0]}
    private = step(model, pazo(model, public_weight=0.0), linear, [batch], number=2)[0]["weight"]
    mixed = step(model, pazo(model, public_weight=0.25), linear, [batch], number=2)[0]["weight"]
    torch.testing.assert_close(mixed, 0.75 * private + 0.25 * PUBLIC[8:12].mean(0))
    alone = [step(model, pazo(model, public_weight=1.0), linear, [{"x": x}], number=10)[0]["weight"] for x in PRIVATE]
    assert all(torch.allclose(update, PUBLIC[8:12].mean(0)) for update in alone), (
        "batches begin again after the last one"
    )


@pytest.mark.parametrize("trained", [True, False])
def test_a_public_gradient_is_taken_in_evaluation_mode(trained):
    class Dropped(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[:, 0]

    model = Dropped(nn.Linear(SIZE, 1).double(), nn.Dropout(0.9)).train(trained)
    state = torch.random.get_rng_state()
    gradient = pazo(model)._public_gradient(1)
    assert torch.allclose(gradient["0.weight"][0], PUBLIC[4:8].mean(0))
    assert model.training is trained and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("count, candidates", [(1, 3), (5, 3), (4, 1)])
def test_directions_in_the_subspace_are_random_mixtures_of_an_orthonormal_basis(count, candidates):
    """Nothing of a private gradient outside of the public span is learnt, and inside it is seen along every direction."""
    model, batch, span = Slopes(SIZE), {"x": PRIVATE[0]}, basis(3, candidates)
    method = pazo(model, guide="subspace", directions=count, candidates=candidates)
    found, values = step(model, method, linear, [batch], number=3, batch_size=5)
    directions = method._directions(3)
    inside = torch.stack([span.T @ directions.piece(k, 0, model.weight, slice(None)) for k in range(count)])
    assert torch.allclose(inside @ inside.T, directions.weights @ directions.weights.T), "orthonormal: lengths are kept"
    slopes = inside @ (span.T @ PRIVATE[0].mean(0))
    torch.testing.assert_close(values.double(), slopes / count, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found["weight"].double(), span @ (inside.T @ slopes) / count, rtol=1e-5, atol=1e-7)


def test_on_average_the_subspace_has_the_gradient_seen_from_it():
    model, span = Slopes(SIZE), basis(0, 2)
    weights = torch.cat(
        [pazo(model, seed=s, guide="subspace", directions=64, candidates=2)._directions(0).weights for s in range(50)]
    )
    assert torch.allclose(weights.T @ weights / len(weights), torch.eye(2).double(), atol=0.1)
    assert torch.allclose(span.T @ span, torch.eye(2).double())


@pytest.mark.parametrize("guide", ["mix", "subspace"])
def test_directions_and_public_gradients_know_nothing_of_private_examples(guide):
    """At every point the model is where it would be with any other batch, or none."""
    model, probe = Slopes(SIZE), torch.eye(SIZE).double()
    seen = []
    for batches in ([{"x": PRIVATE[0]}], [{"x": 1e3 * PRIVATE[1]}, {"x": PRIVATE[2]}], []):
        method = pazo(model, guide=guide, directions=3)
        ask = Listening(model, method, linear, batches, sigma=float(len(seen)), noise=len(seen))
        method.step(ask, 4)
        with torch.no_grad():
            moved = []
            for point in ask.queries["values"].at:
                with point():
                    moved.append(model(probe))
        seen.append(torch.stack([*moved, method._public_gradient(4)["weight"]]))
    assert seen[0].std(0).min() > 0 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_a_release_is_one_vector_of_the_runs_bound():
    """K numbers clipped to C each, as in the authors' code, would be a vector of up to sqrt(K) C."""
    model = Slopes(SIZE)
    for guide in ("mix", "subspace"):
        method = pazo(model, guide=guide, directions=8, clip_norm=0.5)
        values = step(model, method, linear, [{"x": 1e4 * PRIVATE[0][:1]}])[1]
        assert float(values.norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "choose"}, "no guide called 'choose'"),
        ({"public_weight": 1.5}, "public_weight must be between 0 and 1"),
        ({"candidates": 0}, "candidates must be between 1 and"),
        ({"decoder": "doppler"}, "pazo releases 1 numbers"),
    ],
)
def test_bad_settings_are_refused_before_anything_trains(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "pazo", **settings})

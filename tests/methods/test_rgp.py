"""RGP: carriers from releases, and updates that are projections of the gradient."""

import pytest
import torch
from asking import answered, encodings_of
from engine_cases import batch_for, clipped, model_for
from grape_cases import method_for
from small_runs import silent

from dpft.harness.errors import BadInput
from dpft.harness.memory.prediction import Question, measure, predict
from dpft.harness.memory.shapes import SHAPES, Shape
from dpft.harness.runs.resolve import resolve
from dpft.methods.rgp import carriers

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("block", ["twice", "once"])
def test_an_update_is_the_projection_of_the_gradient_on_the_carriers(kind, block):
    model, batch = model_for(kind), batch_for(kind)
    method = method_for(model, name="rgp", rank=3, block=block)
    parameters = trainable(model)
    whole, _, norms = clipped("reference", model, batch, 1e9, {}, parameters)
    encodings = encodings_of(method, parameters)
    sums, _, found = clipped("factored", model, batch, 1e9, encodings, parameters)
    update = answered(method, 0, silent(1).release({n: t.clone() for n, t in sums.items()}))
    assert (found <= norms * 2**0.5).all()
    for name, g in whole.items():
        if name in method._matrices:
            left, right = encodings[name].parts[1].left.double(), encodings[name].parts[0].right.double()
            g, shape = g.flatten(1), g.shape
            x, y = g @ right, left.T @ g
            g = (x @ right.T + left @ y - left @ left.T @ x @ right.T).view(shape)
        assert torch.allclose(update[name], g, atol=1e-6), name
    assert any(p.dim() == 4 for p in method._matrices.values()) == (kind == "vit")


def test_clipping_the_block_once_clips_the_projection_and_twice_no_less():
    model, batch = model_for("bert"), batch_for("bert")
    found = {}
    for block in ("once", "twice"):
        method = method_for(model, name="rgp", rank=3, block=block)
        parameters = {n: p for n, p in trainable(model).items() if n in method._matrices}
        encodings = encodings_of(method, parameters)
        found[block] = clipped("factored", model, batch, 1e9, encodings, parameters)[2][:, 0]
    squares = torch.zeros(len(found["once"]), dtype=torch.float64)
    for i in range(len(squares)):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        g = clipped("reference", model, one, 1e9, {}, parameters)[0]
        for name, e in encodings.items():
            left, right = e.parts[1].left.double(), e.parts[0].right.double()
            p, q = left @ left.T, right @ right.T
            squares[i] += (p @ g[name] + g[name] @ q - p @ g[name] @ q).square().sum()
    assert torch.allclose(found["once"], squares.sqrt(), rtol=1e-5)
    assert (found["twice"] > found["once"] * (1 + 1e-6)).all() and (found["twice"] <= 2**0.5 * found["once"]).all()


def test_noise_of_the_block_that_is_clipped_twice_enters_the_update_once():
    """Noise in the update has the variance of one release in every direction of the carriers, whichever way it is clipped."""
    for block in ("once", "twice"):
        method = method_for(model_for("bert").float(), name="rgp", rank=2, block=block)
        name, p = next(iter(method._matrices.items()))
        encoding = encodings_of(method, {name: p})[name]
        units = torch.eye(encoding.shape(p.shape)[0])
        columns = []
        for unit in units:
            zeros = {
                n: torch.zeros(encodings_of(method, {n: q})[n].shape(q.shape)) for n, q in method._matrices.items()
            }
            update = answered(method, 0, silent(1).release({**zeros, name: unit}))
            columns.append(update[name].flatten().double())
        covariance = torch.stack(columns, 1) @ torch.stack(columns)
        assert torch.allclose(covariance @ covariance, covariance, atol=1e-5)
        assert float(covariance.trace()) == pytest.approx(2 * (16 + 16) - 4, abs=1e-4)


def test_carriers_are_orthonormal_and_find_the_space_of_a_low_rank_history():
    history = torch.randn(12, 3, generator=seeded(0)) @ torch.randn(3, 9, generator=seeded(1))
    left, right = carriers(history, 3, seeded(2))
    assert torch.allclose(left @ (left.T @ history @ right) @ right.T, history, atol=1e-4)
    for source in (
        history,
        torch.zeros(12, 9),
        history[:, :1] @ history[:1],
    ):  # of a rank below that of the carriers, too
        for carrier in carriers(source, 5, seeded(3)):
            assert torch.allclose(carrier.T @ carrier, torch.eye(5), atol=1e-5)


def test_they_come_from_the_weights_first_and_then_from_how_far_those_have_come():
    model = model_for("bert").float()
    method = method_for(model, name="rgp", rank=2)
    always = method_for(model, name="rgp", rank=2, carriers="weights")
    parameters = trainable(model)

    def lefts(of, step):
        return {n: e.parts[1].left for n, e in encodings_of(of, parameters, step).items()}

    first = lefts(method, 0)
    assert all(torch.equal(left, lefts(always, 0)[n]) for n, left in first.items())
    assert all(torch.equal(left, lefts(method, 0)[n]) for n, left in first.items()), "a function of step and weights"
    name, p = next(iter(method._matrices.items()))
    moved = torch.outer(torch.arange(16.0), torch.ones(16))
    with torch.no_grad():
        p.add_(1e-5 * moved)
    left = lefts(method, 1)[name]
    direction = torch.arange(16.0) / torch.arange(16.0).norm()
    assert float((left.T @ direction).norm()) == pytest.approx(1.0, abs=1e-3)
    assert float((lefts(always, 1)[name].T @ direction).norm()) < 0.95
    assert not torch.equal(lefts(always, 1)[name], lefts(always, 2)[name]), "other directions in each step"


def test_matrices_and_head_train_and_nothing_else():
    model = model_for("bert")
    method = method_for(model, name="rgp", rank=3)
    trains = set(trainable(model))
    assert trains == set(method._matrices) | {"head.weight", "head.bias"}
    assert not any("mbedding" in n or "LayerNorm" in n for n in trains) and len(method._matrices) == 12


@pytest.mark.parametrize("carried", ["history", "weights"])
def test_memory_is_predicted_and_holds_no_whole_gradients(carried, monkeypatch):
    settings = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    monkeypatch.setitem(SHAPES, "small-roberta", Shape("roberta", {**settings, "max_position_embeddings": 64}, 0, ""))
    question = Question("small-roberta", "rgp", batch=16, length=24, options={"carriers": carried})
    predicted, real = predict(question), measure(question)
    assert predicted.total == pytest.approx(real.total, rel=0.05)
    plain = predict(Question("small-roberta", "dp-adam", batch=16, length=24))
    copies = predicted.parameters * 4 * (carried == "history")
    assert predicted.total < plain.total + copies


def test_bad_settings_are_refused():
    for settings, message in (
        ({"rank": 0}, "rank must be 1 or more"),
        ({"carriers": "gradients"}, "no carriers called 'gradients'"),
        ({"block": "thrice"}, "no block called 'thrice'"),
        ({"decoder": "rmt"}, "carriers of rgp change"),
    ):
        with pytest.raises(BadInput, match=message):
            resolve({"task": "sst2", "method": "rgp", **settings})

"""dp-zo: its update is the gradient on average, its release one clipped vector, its streams its own, its memory inference's."""

import contextlib
import json
import math

import pytest
import torch
from engine_cases import batch_for, loss, model_for
from small_runs import a_spec, quiet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zeroth_cases import Slopes, linear, method_for, step, whole

from dpft.harness.errors import BadInput
from dpft.harness.privacy import verify_record
from dpft.harness.probes import Clock, LiveBytes
from dpft.harness.query import updates
from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.methods import projection, random_directions
from dpft.methods.lora import DPLoRA
from dpft.methods.random_directions import Directions
from dpft.methods.zeroth import DPZO

pytestmark = pytest.mark.usefixtures("one_thread")


class Quadratic(nn.Module):
    """A loss of second order in all weights, one of them tied and behind dropout; differences there and back are exact."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 4, generator=generator).double())
        self.b = nn.Parameter(torch.randn(4, generator=generator).double())
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return (x @ self.a.T).square().sum(1) + self.drop(x) @ self.b + self.b.square().sum()


def gradients(model, x):
    model.eval()
    found = [torch.autograd.grad(model(row[None])[0], list(model.parameters())) for row in x]
    model.train()
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_the_update_is_the_mean_gradient_seen_along_the_directions(count):
    """In evaluation mode: with dropout the differences would be others, and no function of the example alone."""
    model, x = Quadratic().train(), torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = method_for(model, directions=count)
    found, values = step(model, method, linear, [{"x": x[:2]}, {"x": x[2:]}], number=7, batch_size=10)
    expected = {n: torch.zeros_like(p) for n, p in before.items()}
    for k in range(count):
        z = [whole(method, 7, k, p, number) for number, p in enumerate(before.values())]
        slope = sum(float((g * d).sum()) for row in gradients(model, x) for g, d in zip(row, z, strict=True)) / 10
        assert float(values[k]) == pytest.approx(slope / count, rel=1e-5)
        for held, d in zip(expected.values(), z, strict=True):
            held += d * slope / count
    for name in before:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert model.training and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_update_is_the_gradient_on_average():
    model, x = Slopes(6), torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    method = method_for(model, directions=32)
    found = torch.stack(
        [step(model, method, linear, [{"x": x}], number=s, batch_size=4)[0]["weight"] for s in range(80)]
    )
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - x.mean(0)).abs() < 4 * error).all() and (error < x.mean(0).norm() / 20).all()


def test_a_row_is_clipped_as_one_vector_and_by_itself():
    """K numbers clipped to C each are a vector of up to sqrt(K) C; a sum that is clipped lets an outlier drown the others."""
    model = Slopes(50)
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(2)).double()
    x[0] *= 1e4
    method = method_for(model, directions=16, clip_norm=3.0)
    one, other = (step(model, method, linear, [{"x": row[None]}])[1].double() for row in x)
    assert float(one.norm()) == pytest.approx(3.0, rel=1e-6)
    assert float(other.norm()) < 3.0
    both = step(model, method, linear, [{"x": x}])[1].double()
    torch.testing.assert_close(both, one + other, rtol=1e-5, atol=1e-6)
    slopes = torch.stack([whole(method, 0, k, model.weight) @ x[0] for k in range(16)])
    torch.testing.assert_close(one, 3.0 * slopes.double() / slopes.double().norm(), rtol=1e-4, atol=1e-5)


def test_no_example_no_signal_and_the_release_has_the_noise_of_one_vector():
    model = Slopes(2)
    method = method_for(model, directions=4096, clip_norm=2.0)
    _, values = step(model, method, linear, [], sigma=1.5, batch_size=8)
    assert float(values.std()) == pytest.approx(1.5 * 2.0 / 8, rel=0.05)


def test_noise_and_directions_come_from_streams_that_never_meet():
    """Published codes draw the noise after seeding with the direction's seed: whoever knows it takes the noise off again."""
    model, state = Slopes(300), torch.random.get_rng_state()

    def release(seed, noise):
        method = method_for(model, seed=seed, directions=300, clip_norm=1.0)
        values = step(model, method, linear, [], sigma=1.0, noise=noise)[1]
        return values, [whole(method, 0, k, model.weight) for k in range(3)]

    (first, z), (same, other), (different, again) = release(0, 0), release(1, 0), release(0, 1)
    assert torch.equal(first, same) and not torch.equal(first, different)
    assert torch.equal(z[0], again[0]) and not torch.equal(z[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn from the global generator"
    for k in range(3):  # neither is a stretch of the other
        assert not torch.isin(first, z[k].float()).any()
        assert abs(float(torch.corrcoef(torch.stack([first.double(), z[k]]))[0, 1])) < 0.25


def test_directions_are_standard_normal_and_all_different():
    p = torch.zeros(1000, 700)
    one = Directions(5, 3)
    z = one.moved(0, 0, p, 1.0)
    assert abs(float(z.mean())) < 0.006 and float(z.var()) == pytest.approx(1, abs=0.01)
    assert torch.equal(z, one.moved(0, 0, p, 1.0))
    for other in (one.moved(1, 0, p, 1.0), one.moved(0, 1, p, 1.0), Directions(5, 4).moved(0, 0, p, 1.0)):
        assert abs(float(torch.corrcoef(torch.stack([z.flatten(), other.flatten()]))[0, 1])) < 0.006
    assert not torch.equal(Directions(6, 3).moved(0, 0, p, 1.0), z)
    numbers = {tuple(c) for c in ((1, 2), (12,), (1, 2, 3), (1, 23), (12, 3))}
    draws = {float(torch.rand((), generator=projection.generator(p.device, 0, *c))) for c in numbers}
    assert len(draws) == len(numbers), "counters are told apart"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (100, 7), (7, 100, 3)])
def test_pieces_make_the_whole(shape, dtype, monkeypatch):
    monkeypatch.setattr(random_directions, "PIECE", 64)
    p = torch.randn(shape).to(dtype)
    p = p.mT if p.dim() > 1 else p
    one = Directions(1, 2)
    z = [torch.cat([one.piece(k, 4, p, at) for at in one.borders(p)]).reshape(p.shape) for k in range(3)]
    moved = one.moved(1, 4, p, 0.25)
    exact = p.double() + 0.25 * z[1].double()
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, exact.to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 0, atol=1e-6)
    summed = one.summed(torch.tensor([2.0, 0.0, -1.0]), 4, p)
    assert summed.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(summed.float(), 2 * z[0] - z[2])
    added = p.clone()
    one.add(torch.tensor([2.0, 0.0, -1.0]), 4, p, added, -0.5)
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(added, p - 0.5 * summed.to(p.dtype), **close)
    if p.dim() == 2:
        rows = torch.tensor([[3, 0, 3], [len(p) - 1, 1, 2]])
        assert torch.equal(one.looked_up(1, 4, p, 0.25, rows), moved[rows]), "the same bits, whoever looks them up"


@pytest.mark.parametrize(("count", "steps", "tolerance"), [(1, 600, 0.2), (4, 300, 0.12), (64, 100, 0.06)])
def test_alignment_is_that_of_dp_sgd_times_what_the_directions_cost(count, steps, tolerance):
    """cos = cos(dp-sgd) (1 + S/K)^(-1/2), S = ||mean gradient||^2 over the noise of a coordinate, C_K = C / sqrt(K)."""
    size, clip_norm, noise = 2000, 4.0, 0.25
    model = Slopes(size, torch.float32)
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(4))
    x /= x.norm()
    method = method_for(model, directions=count, clip_norm=clip_norm / math.sqrt(count), smoothing=0.1)
    found = []
    for number in range(steps):
        more = {"sigma": noise / clip_norm, "noise": number}
        update = step(model, method, linear, [{"x": x}], number=number, **more)[0]["weight"]
        found.append((float(update @ x[0]), float(update.square().sum())))
    along, square = (sum(column) / steps for column in zip(*found, strict=True))
    signal = 1 / noise**2  # S
    predicted = (1 + size / signal) ** -0.5 * (1 + signal / count) ** -0.5
    assert along / math.sqrt(square) == pytest.approx(predicted, rel=tolerance)


def at_points(model, run):
    """`ask` that goes to all points and sees nothing there."""

    def ask(values):
        with torch.no_grad():
            for point in values.at:
                with point():
                    run(model)
        return (NoisySum({VALUES: torch.zeros(values.size)}, 0.0, 1.0, 1),)

    return ask


def peak_of(count, fake):
    """(live bytes of a whole step with K directions, those of inference, the model's tensors, the largest of them)."""
    inside = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with inside:
        model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU()))).eval()
        x = torch.ones(4, 64)
    method = method_for(model, directions=max(count, 1))
    with inside:
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with LiveBytes(Clock(torch.device("cpu"))) as live:
            live.label("parameters", model.parameters())
            if count:
                updates.apply(optimizer, parameters, method.step(at_points(model, lambda model: model(x)), 0))
            else:
                with torch.no_grad():
                    model(x)
        sizes = [p.nbytes for p in parameters.values()]
    return sum(live.peak.values()), sum(sizes), max(sizes)


def test_memory_is_that_of_inference_and_of_the_largest_tensor_whatever_k(monkeypatch):
    monkeypatch.setattr(random_directions, "PIECE", 1024)
    monkeypatch.setattr(updates, "_TOGETHER", 1)
    inference, whole, largest = peak_of(0, fake=False)
    one, many = (peak_of(count, fake=False)[0] for count in (1, 16))
    assert one == many <= inference + largest + 4 * 1024 < inference + whole / 2
    assert [peak_of(count, fake=True)[0] for count in (1, 16)] == [one, many]


class ByAdapters(DPZO):
    """The adapters of dp-lora, without gradients."""

    def prepare(self, model, generator):
        return super().prepare(DPLoRA({"targets": "query,value"}).prepare(model, generator), generator)


def test_what_trains_is_moved_and_nothing_else():
    model, batch = model_for("bert"), batch_for("bert")
    model.head_parameters = ["head.weight", "head.bias"]
    for kind, options, trains in ((DPZO, {"trains": "head"}, ("head",)), (ByAdapters, {}, ("lora_", "head"))):
        method = kind(options)
        method.spec = resolve({"task": "sst2", "method": "dp-zo", **options})
        model = method.prepare(model, torch.Generator().manual_seed(0))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        update, values = step(model, method, loss, [batch])
        assert set(update) == {n for n in before if any(part in n for part in trains)} and values.all()
        assert all(update[name].shape == before[name].shape and update[name].any() for name in update)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clipping": "auto-s"}, "leave out clipping"),
        ({"clip_groups": "layer"}, "leave out clipping"),
        ({"decoder": "doppler"}, "leave out decoder"),
        ({"mechanism": "laplace", "noise_shape": "coordinates"}, "has Gaussian noise"),
        ({"mechanism": "laplace", "directions": 1}, "has Gaussian noise"),
        ({"directions": 0}, "directions must be 1 or more"),
        ({"smoothing": 0.0}, "smoothing must be between 1e-06 and 1"),
        ({"trains": "body"}, "no trains called 'body'"),
        ({"epsilon": 0}, "epsilon must be more than 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_trains(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "dp-zo", **settings})


def test_one_direction_may_have_laplace_noise(tiny_bert, settings):
    more = {"directions": 1, "mechanism": "laplace", "noise_shape": "coordinates"}
    record, curve = run.execute(a_spec("dp-zo", tiny_bert, **more), settings, quiet)
    assert record["status"] == "done", record["error"]
    (release,) = record["privacy"]["ledger"][0]["releases"]
    assert (release["name"], release["mechanism"], release["sensitivity_ratio"]) == ("values", "laplace", 1.0)
    assert verify_record(json.loads(json.dumps(record)), 4) == [] and curve[-1]["epsilon"] <= 3


def test_a_model_without_a_head_is_skipped_where_the_head_should_train():
    model = Slopes(3)
    assert "set trains=all" in method_for(model, trains="head").skip(model)

"""dp-sft: the numbers are those of the gradient, the update stays in the subspace, and public data or releases alone span it."""

import dataclasses

import pytest
import torch
from asking import recorded
from engine_cases import batch_for, loss, model_for
from small_runs import not_private, stopped, trained, unwatched, weights
from torch import nn

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.query.noisy_sum import VALUES
from dpft.harness.query.public import Public
from dpft.harness.query.queries import Seen
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.methods import trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
RELEASED = {"subspace": "released", "steps": 6, "warmup_fraction": 0.5, "eval_every": 3, "directions": 3}
BATCHES = [list(range(20 * step, 20 * step + 6)) for step in range(6)]


def a_path(steps=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 5), "b": (7,)}
    return {n: torch.randn(steps, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def flat(basis):
    return torch.cat([part.flatten(1) for part in basis.values()], 1)


def test_directions_are_the_leading_singular_vectors_over_all_parameters_together():
    path = a_path()
    found = flat(trajectory.leading(path, 4))
    expected = torch.linalg.svd(flat(path), full_matrices=False).Vh[:4]
    assert torch.allclose(found @ found.mT, torch.eye(4, dtype=found.dtype), atol=1e-9)
    assert torch.allclose((found @ expected.mT).abs(), torch.eye(4, dtype=found.dtype), atol=1e-9)
    again = {name: torch.cat([stacked, 2 * stacked]) for name, stacked in a_path(3).items()}
    assert len(flat(trajectory.leading(again, 8))) == 3, "no direction of rounding"
    with pytest.raises(CannotRun, match="has no directions"):
        trajectory.leading({name: 0 * stacked for name, stacked in path.items()}, 4)


def test_the_numbers_of_an_example_are_its_gradient_along_the_directions():
    """float64 autograd, one example at a time; weights, mode and bits stay."""
    model, batch = model_for("bert").double().eval(), batch_for("bert")
    own = {name: p for name, p in model.named_parameters() if "layer.0.attention.self" in name or "head" in name}
    steps = {name: torch.randn(5, *p.shape, dtype=torch.float64) for name, p in own.items()}
    basis = trajectory.leading(steps, 5)
    before = {name: p.detach().clone() for name, p in own.items()}
    question = trajectory.numbers(basis, own, 1e-3, 1.0)
    seen = []
    with torch.no_grad():
        for point in question.at:
            with point():
                seen.append(loss(model, batch))
    losses = torch.stack(seen, 1)
    rows = question.of(Seen(model, batch, lambda: losses))
    assert rows.shape == (len(batch["labels"]), 5) == (len(losses), question.size)
    for i in range(len(rows)):
        one = loss(model, {key: value[i : i + 1] for key, value in batch.items()}).sum()
        found = torch.autograd.grad(one, list(own.values()))
        expected = sum(basis[n].flatten(1) @ g.flatten() for n, g in zip(own, found, strict=True))
        assert torch.allclose(rows[i], expected, atol=1e-6 * float(expected.norm()) + 1e-9)
    assert all(torch.equal(p, before[name]) for name, p in own.items())


def test_a_row_is_clipped_as_one_vector_and_the_update_stays_in_the_subspace(setup_of):
    setup = setup_of("dp-sft", directions=4, clip_norm=0.01)
    before = weights(setup)
    found, made = recorded(setup, BATCHES[:4])
    basis = flat({name: part.double() for name, part in setup.method._basis.items()})
    assert all(one.clean[VALUES].shape == (4,) and one.bound == 0.01 for one in found)
    assert all(float(one.clean[VALUES].norm()) <= 6 * 0.01 * (1 + 1e-6) for one in found)
    after = weights(setup)
    names = list(setup.method._basis)
    moved = torch.cat([(after[n] - before[n]).double().flatten() for n in names])
    inside = basis.mT @ (basis @ moved)
    assert float(moved.norm()) > 0.1 and float((moved - inside).norm()) < 1e-4 * float(moved.norm())
    assert all(torch.equal(after[n], before[n]) for n in after if n not in names)
    state = setup.method.state_dict()
    assert state["adam_first|numbers"].shape == (4,), "moments of k numbers and of nothing else"
    assert {key for key in state if key.startswith("adam")} == {"adam_first|numbers", "adam_second|numbers"}


class Sloped(nn.Module):
    """An example is its own gradient."""

    head_parameters = ("head",)

    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(9))

    def forward(self, x):
        return x @ self.head


def test_public_examples_span_the_public_subspace_and_weights_are_put_back():
    spanned = {}
    for at in (2, 5):
        method = registry.instance(resolve({"task": "sst2", "method": "dp-sft", "trains": "head", "directions": 3}))
        x = torch.zeros(9).index_fill_(0, torch.tensor(at), 1.0)
        collate = lambda examples: {"x": torch.stack([e["x"] for e in examples])}  # noqa: E731
        of = lambda model, batch: model(batch["x"])  # noqa: E731
        method.public = Public([{"x": x}, {"x": 2 * x}], collate, of, torch.device("cpu"))
        model = method.prepare(Sloped(), torch.Generator())
        assert not model.head.any() and method._adam.state_dict() == {}
        spanned[at] = method._basis["head"]
        assert torch.allclose(spanned[at].abs(), x[None]) and model.training


def test_a_head_of_zeros_hides_adapters_only_at_the_trajectorys_first_step(setup_of):
    basis = setup_of("dp-sft").method._basis
    assert all(part.any() for part in basis.values()) and len(basis) == 14  # of two layers, and the head
    assert len(flat(basis)) == 8


def test_releases_span_the_released_subspace_and_nothing_else_does(setup_of):
    spans = []
    for more, make in (({}, not_private), ({}, lambda setup: setup), ({"seed": 1}, lambda setup: setup)):
        setup = make(setup_of("dp-sft", **RELEASED, **more))
        found, _ = recorded(setup, BATCHES)
        assert [set(one.clean) == {VALUES} for one in found] == [False] * 3 + [True] * 3
        path = {n: torch.stack([one.noisy.tensors[n] for one in found[:3]]) for n in setup.parameters}
        expected, spanned = flat(trajectory.leading(path, 3)), flat(setup.method._basis)
        assert torch.allclose(spanned, expected, atol=1e-6), "the releases as they came, not what Adam made of them"
        assert not any(key.startswith("path|") for key in setup.method.state_dict())
        spans.append(spanned)
    for one, other in ((0, 1), (1, 2)):
        assert float((spans[one] @ spans[other].mT).square().sum()) < 2.0, "other releases, another subspace"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_cut_in_the_warm_up_resumes_bit_for_bit(optimizer, setup_of, tmp_path):
    whole, path = setup_of("dp-sft", **RELEASED, optimizer=optimizer), tmp_path / "run.ckpt"
    made = trained(whole)
    with unwatched():
        stopped(setup_of("dp-sft", path, **RELEASED, optimizer=optimizer), 3)
    resumed = setup_of("dp-sft", path, **RELEASED, optimizer=optimizer)
    assert trained(resumed, watched=False).progress.curve == made.progress.curve
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspace": "private"}, "takes no subspace of a private trajectory without noise"),
        ({"subspace": "released", "warmup_fraction": 1.0}, "no step left after its warm-up"),
        ({"clipping": "quantile"}, "leave out clipping"),
        ({"decoder": "rmt"}, "leave out clipping, clip_groups, decoder"),
        ({"momentum": 0.9}, "leave out mechanism, momentum"),
        ({"directions": 0}, "directions must be 1 or more"),
        ({"task": "rte"}, "the task rte has none"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "dp-sft", **settings})


def test_releases_need_no_public_data():
    spec = resolve({"task": "rte", "method": "dp-sft", "subspace": "released"})
    assert not registry.instance(spec).needs_public
    assert dataclasses.asdict(spec)["options"] == {"subspace": "released"}

"""dp-selft: the noise of its trials is the run's, public data and sigma choose, and trials leave nothing behind but names."""

import pytest
import torch
from small_runs import weights
from torch import nn

from dpft.harness.errors import BadInput
from dpft.harness.query.public import Public
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (1, 400)


class Blocks(nn.Module):
    """Two blocks and a head; an example says how much it wants of each block's distance to .1 at every coordinate."""

    head_parameters = ("head",)

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.ParameterDict({"w": nn.Parameter(torch.zeros(size))}) for size in SIZES)
        self.head, self.stem = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))


def loss(model, batch):
    distances = torch.stack(
        [(block["w"] - 0.1 * (400 / len(block["w"])) ** 0.25).square().sum() for block in model.layer]
    )
    return (batch["wants"] * distances).sum(1) + model.head.square() + model.stem.square()


def collate(examples):
    return {"wants": torch.tensor([example["wants"] for example in examples])}


def prepared(wants=(1.0, 1.0), sigma=0.0, seed=0, **more):
    own = {
        "task": "sst2",
        "method": "dp-selft",
        "optimizer": "sgd",
        "lr": 0.2,
        "head_lr_factor": 1.0,
        "batch_size": 10,
        **more,
    }
    spec = resolve(own)
    method = registry.instance(spec)
    method.noise_multiplier = sigma
    method.public = Public([{"wants": list(wants)}] * 8, collate, loss, torch.device("cpu"))
    model = method.prepare(Blocks(), torch.Generator().manual_seed(seed))
    return method, model


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("wants, chosen", [((1.0, 0.0), "layer.0"), ((0.0, 1.0), "layer.1")])
def test_public_examples_choose(wants, chosen):
    method, model = prepared(wants)
    assert method.selected == [chosen] and trains(model) == {f"{chosen}.w", "head"}
    assert not any(p.any() for p in model.parameters()), "the weights are put back"


def test_the_noise_of_the_run_chooses_what_holds_out_against_it():
    """The wide block has more to win, and 400 coordinates of noise."""
    assert prepared(sigma=0.0, clip_norm=10.0)[0].selected == ["layer.1"]
    for seed in range(3):
        method, _ = prepared(sigma=2.0, clip_norm=10.0, seed=seed)
        assert method.selected == ["layer.0"] and method.scores["layer.1"] > 5 * method.scores["layer.0"]
    assert prepared(sigma=2.0, clip_norm=10.0, selected_fraction=1.0)[0].selected == ["layer.0", "layer.1"]


def test_a_block_that_diverges_is_the_last_choice():
    method, _ = prepared(wants=(1e15, 1.0), clip_norm=1e9, lr=1e6)
    assert method.selected == ["layer.1"] and method.scores["layer.0"] == float("inf")


def test_noise_has_the_std_of_a_release_and_the_signal_its_bound():
    method, _ = prepared(sigma=0.8, clip_norm=3.0)
    gradient = {"a": torch.full((200, 100), 1.0), "b": torch.full((50,), -2.0)}
    norm = (20000 + 200) ** 0.5
    first, second = (method.noised(gradient, 7, step) for step in (0, 1))
    for name, g in gradient.items():
        noise = first[name] - g * 3.0 / norm
        assert float(noise.std()) == pytest.approx(0.8 * 3.0 / 10, rel=0.25 if name == "b" else 0.03)
        assert not torch.equal(first[name], second[name])
    assert not torch.allclose(first["b"] - second["b"], (first["a"] - second["a"]).flatten()[:50]), "own draws"
    small = {"a": torch.full((4,), 0.1)}
    method.noise_multiplier = 0.0
    assert torch.equal(method.noised(small, 7, 0)["a"], small["a"])


def test_a_run_tells_it_sigma_and_starts_where_dp_adam_does(setup_of):
    setup, plain = setup_of("dp-selft"), setup_of("dp-adam")
    method = setup.method
    assert method.noise_multiplier == setup.plan.noise_multiplier > 0
    assert all(torch.equal(value, weights(setup)[name]) for name, value in weights(plain).items())
    assert len(method.selected) == 1 and method.scores.keys() == {f"encoder.encoder.layer.{i}" for i in (0, 1)}
    own = {name for name in setup.parameters if name.startswith(f"{method.selected[0]}.")}
    assert set(setup.parameters) == own | setup.head and len(own) == 16
    assert len(set(method.scores.values())) == 2


def test_what_it_cannot_do_is_said():
    with pytest.raises(BadInput, match="leave out mechanism=laplace"):
        resolve({"task": "sst2", "method": "dp-selft", "mechanism": "laplace"})
    with pytest.raises(BadInput, match="rte has none"):
        resolve({"task": "rte", "method": "dp-selft"})
    model = nn.Linear(2, 2)
    model.head_parameters = ()
    assert "fewer than two" in registry.make("dp-selft", "mean", {}).skip(model)

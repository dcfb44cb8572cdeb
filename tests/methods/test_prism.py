"""PRISM: what is clipped, noised and stepped is LoRA's product, against formulas on whole matrices in float64."""

import copy

import pytest
import torch
from asking import answered, encodings_of
from causal_cases import CONFIGS
from engine_cases import assert_same, clipped
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.methods.tangent import Basis, Tangent, basis
from dpft.methods.tangent_adam import TangentAdam

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = 3


class Net(nn.Module):
    """Two layers that are adapted, of different shapes, and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.query = nn.Embedding(9, 8), nn.Linear(8, 7)
        self.value, self.head = nn.Linear(7, 6), nn.Linear(6, 3)
        self.head_parameters = ["head.weight", "head.bias"]

    def forward(self, input_ids):
        return self.head(torch.tanh(self.value(torch.tanh(self.query(self.embed(input_ids))))).mean(1))


def loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def batch_of(size=5):
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, 9, (size, 6)), "labels": torch.arange(size) % 3}


def prepared(name="prism", optimizer="sgd", **options):
    """(the method, its model in float64, what trains)."""
    torch.manual_seed(0)
    settings = {"rank": RANK, "targets": "query,value", **options}
    spec = resolve({"task": "sst2", "method": name, "optimizer": optimizer, "lr": 0.1, "steps": 4, **settings})
    method, net = registry.instance(spec), Net()
    assert method.skip(net) is None
    model = method.prepare(net, torch.Generator().manual_seed(0)).double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    method.optimizer(parameters, frozenset(net.head_parameters), spec)
    return method, model, parameters


def product(parameters, layer, scaling):
    weight = {side: parameters[f"{layer}.lora_{side}.default.weight"].detach() for side in "AB"}
    return scaling * weight["B"] @ weight["A"]


def projection(z, g, rank=RANK):
    """Of g on the tangent space at z, by singular vectors of z: nothing of the factors."""
    u, _, v = torch.linalg.svd(z)
    left, right = u[:, :rank] @ u[:, :rank].T, v[:rank].T @ v[:rank]
    return left @ g + g @ right - left @ g @ right


def whole_gradients(model, parameters, layer, scaling, batch):
    """Per example: the gradient of the whole weight of a layer whose adapter is merged."""
    merged = copy.deepcopy(model)
    target = merged.get_submodule(layer)
    plain = nn.Linear(target.in_features, target.out_features).double()
    plain.weight.data = target.base_layer.weight + product(parameters, layer, scaling)
    plain.bias.data = target.base_layer.bias
    setattr(merged, layer, plain)
    return torch.stack([torch.autograd.grad(one, plain.weight, retain_graph=True)[0] for one in loss(merged, batch)])


@pytest.mark.parametrize("alpha", [1, 16])
@pytest.mark.parametrize("engine", ["factored", "reference", "opacus"])
def test_what_is_clipped_is_the_projection_of_the_whole_gradient(engine, alpha):
    method, model, parameters = prepared(alpha=alpha)
    with torch.no_grad():  # away from the balanced start
        for n, p in parameters.items():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(n))))
    encodings, batch = encodings_of(method, parameters), batch_of()
    frozen = [n for n in parameters if n.startswith("head")]
    for n in frozen:
        parameters.pop(n).requires_grad_(False)
    total, _, norms = clipped(engine, model, batch, 1e9, encodings, parameters, loss)
    squares = 0
    for layer in ("query", "value"):
        g, z = whole_gradients(model, parameters, layer, alpha / RANK, batch), product(parameters, layer, alpha / RANK)
        squares += torch.stack([projection(z, one).square().sum() for one in g])
        space = space_of(method, parameters, layer)
        x = (total[f"{layer}.lora_A.default.weight"], total[f"{layer}.lora_B.default.weight"])
        assert torch.allclose(lifted(space, x), projection(z, g.sum(0)), atol=1e-9)
    assert torch.allclose(norms[:, 0], squares.sqrt(), rtol=1e-8)


def space_of(method, parameters, layer):
    scaling = method._pairs[layer][2]
    sides = (parameters[f"{layer}.lora_{side}.default.weight"] for side in "BA")
    b, a = sides
    return Tangent(basis(b), basis(a.mT), scaling)


def lifted(space, x):
    return space.left.columns @ x[0].double() + x[1].double() @ space.right.columns.mT


def factors(*lengths, m=7, n=6):
    torch.manual_seed(2)
    b = torch.randn(m, RANK, dtype=torch.float64)
    u, _, v = torch.linalg.svd(b, full_matrices=False)
    return u @ torch.diag(torch.tensor(lengths, dtype=torch.float64)) @ v, torch.randn(RANK, n, dtype=torch.float64)


def map_of_noise(space, m, n):
    """The matrix from noise in the coordinates, as released, to what becomes of it in the product."""
    eye = torch.eye(RANK * (n + m), dtype=torch.float64)
    parts = [(row[: RANK * n].view(RANK, n), row[RANK * n :].view(m, RANK)) for row in eye]
    return torch.stack([lifted(space, space.inside(x)).flatten() for x in parts], 1)


@pytest.mark.parametrize("lengths", [(1.0, 0.8, 0.5), (1.0, 1e-3, 1e-3), (1.0, 0.5, 1e-9), (0.0, 0.0, 0.0)])
def test_noise_is_isotropic_in_the_tangent_space_however_ill_conditioned(lengths):
    """Its covariance is a projection: of the space of the directions that are asked for, never longer and never shorter."""
    b, a = factors(*lengths)
    space = Tangent(basis(b), basis(a.mT), 2.0)
    covariance = (m := map_of_noise(space, 7, 6)) @ m.T
    assert torch.allclose(covariance @ covariance, covariance, atol=1e-10)
    k = sum(length > 1e-6 for length in lengths)
    assert float(covariance.trace()) == pytest.approx(k * 6 + (7 - k) * RANK)
    # what is released is the gradient in those coordinates: no direction of it is stretched
    g = torch.randn(7, 6, dtype=torch.float64)
    first, second = (e.dense(x[None])[0] for e, x in zip(space.encodings(), (2 * b.T @ g, 2 * g @ a.T), strict=True))
    assert torch.allclose(lifted(space, (first, second)).flatten(), covariance @ g.flatten(), atol=1e-6)
    kept = float(first.square().sum() + second.square().sum())
    assert kept == pytest.approx(float((covariance @ g.flatten()).square().sum()), rel=1e-5)


def stepped(method, parameters, adam_steps=1, imbalance=1.0):
    """Changes of the products by steps of plain SGD as the loop takes them, on releases of noise and one gradient."""
    with torch.no_grad():
        for n, p in parameters.items():
            if "lora_" in n:
                p.mul_(imbalance if "lora_A" in n else 1 / imbalance)
    changes = []
    for step in range(adam_steps):
        encodings = encodings_of(method, parameters, step)
        sums = zero_sums(parameters, encodings)
        scalings = {layer: parameters_scaling(method, layer) for layer in ("query", "value")}
        for layer, scaling in scalings.items():
            a, b = (parameters[f"{layer}.lora_{side}.default.weight"].detach() for side in "AB")
            g = torch.randn(len(b), a.shape[1], dtype=b.dtype, generator=torch.Generator().manual_seed(step))
            for name, own in ((f"{layer}.lora_A", scaling * b.T @ g), (f"{layer}.lora_B", scaling * g @ a.T)):
                name = f"{name}.default.weight"
                sums[name] = (encodings[name].dense(own[None])[0] if name in encodings else own).contiguous()
        mechanism = GaussianMechanism(0.5, 1.0, 4, source("cpu", step))
        before = {layer: product(parameters, layer, s) for layer, s in scalings.items()}
        with torch.no_grad():
            for n, u in answered(method, step, mechanism.release(sums)).items():
                parameters[n].sub_(u, alpha=0.1)
        mechanism.close()
        changes += [product(parameters, layer, s) - before[layer] for layer, s in scalings.items()]
    return torch.cat([c.flatten() for c in changes])


def parameters_scaling(method, layer):
    return method.settings["alpha"] / method.settings["rank"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("change", "imbalance"), [({"alpha": 64}, 1.0), ({}, 4.0), ({}, 1 / 64)])
def test_neither_alpha_nor_the_shares_of_the_factors_change_the_step_of_the_product(optimizer, change, imbalance):
    """Clipped gradient, noise and step together; the same releases of noise, for the bases are the same."""
    plain = stepped(*prepared(optimizer=optimizer)[::2], adam_steps=3)
    other = stepped(*prepared(optimizer=optimizer, **change)[::2], adam_steps=3, imbalance=imbalance)
    assert float((plain - other).norm()) <= 1e-5 * float(plain.norm())


@pytest.mark.parametrize(("change", "imbalance"), [({"alpha": 64}, 1.0), ({}, 4.0)])
def test_they_do_change_that_of_dp_lora(change, imbalance):
    def of(imbalance, **options):
        method, _, parameters = prepared("dp-lora", alpha=options.get("alpha", 16))
        with torch.no_grad():
            for n, p in parameters.items():
                if "lora_B" in n:
                    p.normal_(generator=torch.Generator().manual_seed(3)).mul_(16 / options.get("alpha", 16))
        return stepped(method, parameters, imbalance=imbalance)

    plain, other = of(1.0), of(imbalance, **change)
    assert float((plain - other).norm()) > 0.5 * float(plain.norm())


def test_the_step_goes_to_the_nearest_matrix_of_the_rank_with_balanced_factors():
    b, a = factors(3.0, 2.0, 1.0)
    space = Tangent(basis(b), basis(a.mT), 2.0)
    x = space.inside((torch.randn(RANK, 6).double(), torch.randn(7, RANK).double()))
    u, s, v = torch.linalg.svd(2 * b @ a - 0.3 * lifted(space, x))
    nearest = u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK]
    new_b, new_a = space.retracted(x, 0.3)
    assert torch.allclose(2 * new_b @ new_a, nearest, atol=1e-12)
    assert torch.allclose(new_b.T @ new_b, new_a @ new_a.T, atol=1e-12)


def turned(side, rotation):
    return Basis(side.full @ rotation, rotation.mT @ side.root, side.kept, side.inverse @ rotation)


def test_adam_does_the_same_whatever_the_bases_and_carries_vectors_by_projection():
    rotation = torch.linalg.qr(torch.randn(RANK, RANK).double())[0]
    adams, gradients = (TangentAdam(0.5), TangentAdam(0.5)), []
    for step in range(3):
        torch.manual_seed(step)
        b, a, g = torch.randn(7, RANK).double(), torch.randn(RANK, 6).double(), torch.randn(7, 6).double()
        plain = Tangent(basis(b), basis(a.mT), 2.0)
        other = Tangent(turned(plain.left, rotation), turned(plain.right, rotation.mT), 2.0)
        found = []
        for adam, space in zip(adams, (plain, other), strict=True):
            u, v = space.left.columns, space.right.columns
            x = (u.mT @ g, g @ v - u @ (u.mT @ g @ v))
            found.append(lifted(space, adam.direction("z", space, x, 0.1, 1 + step)))
        assert torch.allclose(*found, atol=1e-5)
        gradients = [projection(b @ a, old) for old in [*gradients, g]]
    kept = adams[0]._kept["z"]
    first = (
        kept["left"].double() @ kept["first_rows"].double() + kept["first_columns"].double() @ kept["right"].double().mT
    )
    by_hand = sum(0.1 * 0.9 ** (2 - i) * g for i, g in enumerate(gradients))
    assert torch.allclose(first, by_hand, atol=1e-5)


def test_adam_divides_by_no_less_than_the_known_noise():
    b, a = factors(3.0, 2.0, 1.0)
    space = Tangent(basis(b), basis(a.mT), 1.0)
    x = space.inside((torch.full((RANK, 6), 1e-3).double(), torch.full((7, RANK), 1e-3).double()))
    found = TangentAdam(0.5).direction("z", space, x, 0.2, 1)
    for one, own in zip(found, x, strict=True):
        assert torch.allclose(one, own / (0.5**0.5 * 0.2 + 1e-8), atol=1e-9)


@pytest.mark.parametrize("start", ["spectral", "zero"])
def test_the_model_starts_as_it_was(start):
    torch.manual_seed(0)
    plain, batch = Net(), batch_of()
    _, model, parameters = prepared(start=start)
    assert torch.allclose(model(batch["input_ids"]).float(), plain(batch["input_ids"]), atol=1e-6)
    held = product(parameters, "query", 16 / RANK)
    u, s, v = torch.linalg.svd(plain.query.weight.detach().double())
    leading = u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK] if start == "spectral" else torch.zeros(7, 8).double()
    assert torch.allclose(held, leading, atol=5e-3)  # by iterations


def test_a_start_at_zero_asks_only_what_the_rows_of_a_can_say_and_fills_the_rank():
    method, _, parameters = prepared(start="zero")
    a, b = (f"query.lora_{side}.default.weight" for side in "AB")
    encodings = encodings_of(method, parameters)
    assert not encodings[a].dense(torch.randn(1, *parameters[a].shape).double()).any()
    stepped(method, parameters)
    assert int(torch.linalg.matrix_rank(product(parameters, "query", 1.0))) == RANK
    assert encodings_of(method, parameters, 1)[a].dense(torch.randn(1, *parameters[a].shape).double()).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_engines_agree_on_language_models(kind):
    """GPT-2's fused and transposed projection, Llama's narrow keys."""
    import transformers

    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    net.head_parameters = []
    method = registry.make("prism", "mean", {"rank": RANK})
    assert method.skip(net) is None
    model = method.prepare(net, torch.Generator().manual_seed(0)).double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.eval()  # without dropout
    batch = {"input_ids": torch.randint(4, 30, (4, 7))}

    def language(model, batch):
        logits = model(**batch, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none").mean(1)

    encodings = encodings_of(method, parameters)
    found = [clipped(e, model, batch, 0.02, encodings, parameters, language) for e in ("factored", "reference")]
    assert (found[1][2] > 0.02).any()
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-9)
    assert_same(found[0][0], found[1][0], 1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "random"}, "no start called 'random'"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"decoder": "rmt"}, "coordinates of prism turn"),
        ({"weight_decay": 0.1}, "Weight decay would pull"),
        ({"optimizer": "sgd", "momentum": 0.9}, "carries no momentum"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "prism", **settings})


def test_models_that_it_cannot_take_are_skipped():
    assert "lower `rank` to 7" in registry.make("prism", "mean", {"rank": 8, "targets": "query"}).skip(Net())
    assert "linear layers" in registry.make("prism", "mean", {"rank": 3, "targets": "embed"}).skip(Net())

"""Projections of gradients: how they are drawn, what they apply to, what is clipped and noised under them."""

import pytest
import torch
import transformers as hf
from asking import encodings_of
from engine_cases import Classifier, batch_for, clipped, loss, model_for
from grape_cases import method_for
from small_runs import trained

from dpft.harness.engine.base import zero_sums
from dpft.harness.query.encoding import Encoding
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.methods import projection

pytestmark = pytest.mark.usefixtures("one_thread")


RANDOM = ("gaussian", "rows", "srht")


def drawn(kind="gaussian", size=12, rank=4, scale="unbiased", seed=0):
    """The [size, rank] matrix S of a projection."""
    found = projection.draw(
        kind, torch.Size((size, 99)), 0, rank, scale, projection.generator(torch.device("cpu"), seed, 0, 0)
    )
    if found.left.dim() == 2:
        return found.left
    return (
        torch.zeros(size, len(found.left))
        .index_put_((found.left, torch.arange(len(found.left))), torch.tensor(1.0))
        .mul_(found.scale)
    )


@pytest.mark.parametrize("kind", RANDOM)
def test_the_unbiased_scale_projects_to_the_identity_on_average(kind):
    mean = sum(s @ s.T for s in (drawn(kind, seed=seed) for seed in range(4000))) / 4000
    # the largest standard deviation of an entry is sqrt(2 / 4) for one draw of gaussian, sqrt(12 / 4 - 1) for rows
    assert (mean - torch.eye(12)).abs().max() < 5 * 2**0.5 / 4000**0.5


@pytest.mark.parametrize("kind", RANDOM)
def test_the_authors_scale_is_shorter_by_the_root_of_the_rank(kind):
    assert torch.allclose(drawn(kind, scale="code") * 2, drawn(kind))
    assert drawn("gaussian", 4000, 16, "code").std() == pytest.approx(1 / 16, rel=0.02)


def test_rows_are_sampled_without_replacement_and_hadamard_columns_are_orthogonal():
    assert torch.equal(drawn("rows").count_nonzero(0), torch.ones(4).long())
    assert int(drawn("rows").count_nonzero(1).max()) == 1
    s = drawn("srht", size=16)
    assert torch.allclose(s.abs(), torch.full((16, 4), 0.5))
    assert torch.allclose(s.T @ s, 4.0 * torch.eye(4))


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 2, 3, 2)])
def test_lifting_is_the_transpose_of_encoding(shape):
    torch.manual_seed(0)
    size = torch.Size(shape)
    n = size[1:].numel()
    for left in (None, torch.randn(5, 3), torch.tensor([4, 1])):
        for right in (None, torch.randn(n, 2), torch.tensor([1, 0, 4])) if len(shape) > 1 else (None,):
            encoding = Encoding(left, right, scale=1.5)
            g, x = torch.randn(size).double(), torch.randn(encoding.shape(size)).double()
            assert encoding.lift(x, size).shape == size
            there, back = (encoding.dense(g[None])[0] * x).sum(), (g * encoding.lift(x, size)).sum()
            assert float(there) == pytest.approx(float(back), rel=1e-12)


def test_the_smaller_side_of_every_matrix_of_the_body_is_projected_and_nothing_else():
    model = model_for("vit")
    found = encodings_of(method_for(model), dict(model.named_parameters()))
    shapes = {name: (p.shape, found[name].shape(p.shape)) for name, p in model.named_parameters() if name in found}
    assert {name for name, p in model.named_parameters() if p.dim() in (2, 4)} - set(found) == {"head.weight"}
    (patches,) = [pair for name, pair in shapes.items() if "patch" in name]
    assert patches == ((16, 3, 4, 4), (4, 48))
    intermediate = {pair for pair in shapes.values() if 24 in pair[0]}
    assert intermediate == {((24, 16), (24, 4)), ((16, 24), (4, 24))}


def test_a_matrix_that_has_no_more_than_the_rank_stays_as_it_is():
    model = model_for("vit")
    assert encodings_of(method_for(model, rank=16), dict(model.named_parameters())) == {}


def test_embedding_tables_are_projected_along_their_width_when_asked():
    model, batch = model_for("bert"), batch_for("bert")
    parameters = dict(model.named_parameters())
    raw = encodings_of(method_for(model), parameters)
    found = encodings_of(method_for(model, embeddings="projected"), parameters)
    tables = [n for n in found if "embeddings" in n]
    assert len(tables) == 3 and set(found) - set(raw) == set(tables)
    assert all(found[n].left is None and found[n].right.shape == (16, 4) for n in tables)
    fast, slow = (clipped(engine, model, batch, 0.1, found) for engine in ("factored", "reference"))
    assert torch.allclose(fast[2], slow[2], rtol=1e-10)
    assert all(torch.allclose(fast[0][n], slow[0][n], rtol=1e-9, atol=1e-12) for n in fast[0])


def test_projections_change_at_refreshes_and_only_there():
    model = model_for("bert")
    method = method_for(model, refresh=3)
    parameters = dict(model.named_parameters())
    name, other = [n for n in parameters if n.endswith(("query.weight", "key.weight"))][:2]
    at = [encodings_of(method, parameters, step)[name].right for step in range(7)]
    assert torch.equal(at[0], at[1]) and torch.equal(at[0], at[2]) and torch.equal(at[3], at[5])
    assert not torch.equal(at[2], at[3]) and not torch.equal(at[5], at[6]) and not torch.equal(at[0], at[6])
    assert not torch.equal(at[0], encodings_of(method, parameters)[other].right), "layers must not share a projection"
    assert torch.equal(at[0], encodings_of(method, parameters)[name].right), (
        "an old one must be made again from its seed"
    )
    replica = method_for(model_for("bert"), refresh=3)
    assert torch.equal(at[3], encodings_of(replica, parameters, 4)[name].right)
    assert not torch.equal(at[0], encodings_of(method_for(model, seed=1), parameters)[name].right)


def test_the_loop_trains_in_the_subspace_of_its_step(setup_of):
    """The release, the projection it was made with and the lifted update belong to one another in every step."""
    setup = setup_of("dp-grape", optimizer="sgd", refresh=2)
    name = next(iter(setup.method.sides))
    spaces, trains = [], setup.method.step

    def watched(ask, step):
        def asking(gradient):
            (noisy,) = ask(gradient=gradient)
            spaces.append((gradient.encodings[name].right, noisy.tensors[name].clone()))
            return (noisy,)

        update = trains(asking, step)
        space, release = spaces[-1]
        assert release.shape == (len(setup.parameters[name]), 16)
        assert torch.equal(space, encodings_of(setup.method, setup.parameters, step)[name].right)
        assert torch.equal(update[name], release @ space.T)
        return update

    setup.method.step = watched
    trained(setup)
    spaces = [space for space, _ in spaces]
    assert torch.equal(spaces[0], spaces[1]) and torch.equal(spaces[2], spaces[3])
    assert not torch.equal(spaces[1], spaces[2])


def gpt2():
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=20, resid_pdrop=0, embd_pdrop=0)
    config.attn_pdrop = 0.0
    return Classifier(config).double()


@pytest.mark.parametrize("projected", [*RANDOM, "identity"])
@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
def test_per_example_gradients_are_projected_and_clipped_in_one_norm_with_the_rest(kind, projected):
    """Against autograd on each example alone, in float64: Linear, Conv1D, patch embeddings."""
    model, batch = (gpt2(), batch_for("roberta")) if kind == "gpt2" else (model_for(kind), batch_for(kind))
    parameters = dict(model.named_parameters())
    maps = encodings_of(method_for(model, projection=projected), parameters)
    assert len(maps) >= (4 if kind == "gpt2" else 6)
    expected, norms = zero_sums(parameters, maps), []
    for i in range(len(batch["labels"])):
        alone = loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0]
        rows = dict(zip(parameters, torch.autograd.grad(alone, list(parameters.values())), strict=True))
        for name, encoding in maps.items():
            s = dense_side(encoding, rows[name].flatten(1).shape)
            rows[name] = s.T @ rows[name].flatten(1) if encoding.left is not None else rows[name].flatten(1) @ s
        norms.append(torch.stack([g.square().sum() for g in rows.values()]).sum().sqrt())
        for name, g in rows.items():
            expected[name] += g * min(1.0, 0.3 / float(norms[-1]))
    found, _, found_norms = clipped("factored", model, batch, 0.3, maps)
    assert torch.allclose(found_norms[:, 0], torch.stack(norms), rtol=1e-10)
    largest = max(float(t.norm()) for t in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-10 * largest, name


def dense_side(encoding, shape):
    side, size = (encoding.left, shape[0]) if encoding.left is not None else (encoding.right, shape[1])
    if side.dim() == 2:
        return side.double()
    return torch.eye(size, dtype=torch.float64)[:, side] * encoding.scale


def test_the_subspace_is_what_is_noised():
    """Noise is white in the subspace; lifted, its covariance is (sigma C/B)^2 S S^T: on average that of DP-SGD."""
    shape = torch.Size((20_000, 8))
    encoding = projection.draw("gaussian", shape, 1, 4, "unbiased", projection.generator(torch.device("cpu"), 0, 0, 0))
    noisy = GaussianMechanism(2.0, 0.5, 10, source("cpu", "noise")).release({"w": torch.zeros(encoding.shape(shape))})
    assert noisy.tensors["w"].shape == (20_000, 4)
    assert noisy.tensors["w"].std() == pytest.approx(0.1, rel=0.01)
    lifted = encoding.lift(noisy.tensors["w"], shape)
    expected = 0.1**2 * encoding.right @ encoding.right.T
    assert (lifted.T @ lifted / 20_000 - expected).norm() <= 0.03 * expected.norm()


def test_sums_and_moments_shrink_as_rank_over_the_smaller_side(setup_of):
    setup = setup_of("dp-grape", rank=8)
    optimizers, original = [], setup.method.optimizer
    setup.method.optimizer = lambda *arguments: optimizers.append(original(*arguments)) or optimizers[-1]
    sums, release = {}, setup.mechanism.release
    setup.mechanism.release = lambda total, *how: (
        sums.update({n: t.numel() for n, t in total.items()}) or release(total, *how)
    )
    trained(setup)
    (optimizer,) = optimizers
    assert not any(optimizer.state.values()), "plain SGD keeps nothing"
    state = setup.method.state_dict()
    for name, p in setup.parameters.items():
        share = 8 / min(p.flatten(1).shape) if name in setup.method.sides else 1.0
        assert sums[name] == share * p.numel(), name
        moments = [t for key, t in state.items() if key.endswith(f"|{name}")]
        assert len(moments) == 2 and all(t.numel() == share * p.numel() for t in moments), name
    assert sum(t.numel() for t in state.values()) == 2 * sum(sums.values()), "projections are not kept"
    assert len(setup.method.sides) == 12 and setup.method._drawn == {}

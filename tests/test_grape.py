"""DP-GRAPE and its kin: the projections, what is clipped and noised under them, Adam inside, the way back."""

import dataclasses

import pytest
import torch
import transformers as hf
from engine_cases import Classifier, batch_for, clipped, loss, model_for, no_clock
from small_runs import a_spec, quiet, trained, weights

from dpft.harness import loop, registry, run, spec, updates
from dpft.harness.engine.base import example_gradient, zero_sums
from dpft.harness.engine.encoding import Encoding
from dpft.harness.engine.reference import ReferenceEngine
from dpft.harness.errors import BadInput
from dpft.harness.mechanism import GaussianMechanism, stream
from dpft.methods import projection

pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM = ("gaussian", "rows", "srht")
IDENTITY = {"projection": "identity", "rank": 10_000}


def method_for(model, seed=0, name="dp-grape", head=("head.weight", "head.bias"), **options):
    """The method, prepared for a model of engine_cases."""
    model.head_parameters = list(head)
    method = registry.make(name, "mean", {"rank": 4, **options})
    method.prepare(model, torch.Generator().manual_seed(seed))
    return method


def encodings_of(method, parameters, step=0):
    found = {name: method.encoding(name, p, step) for name, p in parameters.items()}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


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


# --- the projections


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


# --- which parameters, which side, when


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
    spaces, decode = [], setup.method.decode

    def watched(noisy, step):
        space = setup.method.encoding(name, setup.parameters[name], step).right
        assert noisy.tensors[name].shape == (len(setup.parameters[name]), 16)
        update = decode(noisy, step)
        assert torch.equal(update[name], noisy.tensors[name] @ space.T)
        spaces.append(space)
        return update

    setup.method.decode = watched
    trained(setup)
    assert torch.equal(spaces[0], spaces[1]) and torch.equal(spaces[2], spaces[3])
    assert not torch.equal(spaces[1], spaces[2])


# --- what is clipped and noised


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
    assert torch.allclose(found_norms, torch.stack(norms), rtol=1e-10)
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
    noisy = GaussianMechanism(2.0, 0.5, 10, stream("cpu", "noise")).release({"w": torch.zeros(encoding.shape(shape))})
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
    setup.mechanism.release = lambda total: sums.update({n: t.numel() for n, t in total.items()}) or release(total)
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


# --- Adam inside, and the way back


def steps_of(setup, noise="same"):
    """The weights after training with a noise stream that methods share."""
    mechanism = GaussianMechanism(
        setup.mechanism.noise_multiplier, setup.spec.clip_norm, setup.spec.batch_size, stream("cpu", noise)
    )
    setup = dataclasses.replace(setup, mechanism=mechanism)
    trained(setup)
    mechanism.close()
    return weights(setup)


@pytest.mark.parametrize("options", [IDENTITY, {"rank": 10_000}])
def test_the_identity_and_a_full_rank_are_dp_adam(options, setup_of):
    """To 1e-6, not bit for bit: torch's fused Adam multiplies and divides in another order than a direction handed to SGD."""
    plain = steps_of(setup_of("dp-adam"))
    same = setup_of("dp-grape", **options)
    assert (len(same.method.sides) == 12) == (options == IDENTITY)
    for name, value in steps_of(same).items():
        assert (value - plain[name]).norm() <= 1e-6 * plain[name].norm() + 1e-7, name
    other = steps_of(setup_of("dp-grape", rank=16))
    assert any((other[n] - plain[n]).norm() > 1e-3 * plain[n].norm() for n in plain if plain[n].dim() == 2)


def test_with_sgd_the_identity_is_dp_sgd_bit_for_bit(setup_of):
    settings = {"lr": 0.02, "momentum": 0.5, "optimizer": "sgd", "head_lr_factor": 1.0, "weight_decay": 0.01}
    plain, same = steps_of(setup_of("dp-sgd", **settings)), steps_of(setup_of("dp-grape", **IDENTITY, **settings))
    assert all(torch.equal(value, plain[name]) for name, value in same.items())


def adam_by_hand(releases, resets=()):
    first = second = seen = 0
    for step, release in enumerate(releases):
        if step in resets:
            first = second = seen = 0
        seen += 1
        first, second = 0.9 * first + 0.1 * release, 0.999 * second + 0.001 * release**2
    return (first / (1 - 0.9**seen)) / ((second / (1 - 0.999**seen)).sqrt() + 1e-8)


@pytest.mark.parametrize("reset", [False, True])
def test_adam_runs_in_the_subspace_and_starts_anew_only_when_told(reset, setup_of):
    setup = setup_of("dp-grape", refresh=2, reset=reset)
    setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    name, bias = next(iter(setup.method.sides)), next(n for n, p in setup.parameters.items() if p.dim() == 1)
    releases = {name: [], bias: []}
    for step in range(4):
        torch.manual_seed(step)
        maps = encodings_of(setup.method, setup.parameters, step)
        sums = {n: torch.randn(t.shape) for n, t in zero_sums(setup.parameters, maps).items()}
        for n, seen in releases.items():
            seen.append(sums[n].double() / 60)
        update = setup.method.decode(GaussianMechanism(0.0, 1.0, 60, stream("cpu", 0)).release(sums), step)
        resets = (2,) if reset else ()
        by_hand = adam_by_hand(releases[name], resets) @ maps[name].right.double().T
        assert torch.allclose(update[name].double(), by_hand, rtol=1e-4, atol=1e-5)
        assert torch.allclose(update[bias].double(), adam_by_hand(releases[bias]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"refresh": 2},
        {"refresh": 3},
        {"refresh": 3, "reset": True, "projection": "srht"},
        {"refresh": 3, "decoder": "doppler", "projection": "rows"},
        {"refresh": 3, "decoder": "adambc"},
        {"refresh": 2, "optimizer": "sgd", "momentum": 0.9, "lr": 0.02},
    ],
)
def test_a_run_cut_around_a_refresh_resumes_bit_for_bit(options, setup_of, tmp_path):
    resumes_bit_for_bit("dp-grape", options, setup_of, tmp_path)


def resumes_bit_for_bit(method, options, setup_of, tmp_path):
    whole = setup_of(method, **options)
    state = trained(whole)

    def interrupt(step, row):
        if step == 3:
            raise KeyboardInterrupt

    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            dataclasses.replace(setup_of(method, path, **options), checkpoint_seconds=0.0), loop.State(), interrupt
        )
    resumed, again = setup_of(method, path, **options), loop.State()
    seen = []
    loop.train(resumed, again, lambda step, row: seen.append(step))
    assert seen == [3, 4] and again.curve == state.curve
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


# --- with decoders, clip groups and other settings


@pytest.mark.parametrize(
    "more",
    [
        {"decoder": "rmt"},
        {"decoder": "rmt", "input": "ema", "reset": False},
        {"decoder": "rmt", "reset": True},
        {"decoder": "muon"},
        {"clip_groups": "layer", "projection": "srht", "projection_scale": "code"},
        {"embeddings": "projected", "head": "mlm"},
        {"projection": "rows", "optimizer": "adamw", "weight_decay": 0.01},
    ],
)
def test_it_runs_with_other_choices_and_spends_the_same(more, tiny_bert, settings):
    plain, other = (run.execute(a_spec("dp-grape", tiny_bert, **m), settings, quiet)[0] for m in ({}, more))
    assert other["status"] == "done", other["error"]
    assert other["privacy"]["ledger"] == plain["privacy"]["ledger"]


def test_a_decoder_denoises_the_release_in_the_subspace(setup_of):
    """Everything within reach of the noise is dropped: the release is white there, so nothing is left of pure noise."""
    setup = setup_of("dp-grape", decoder="rmt", optimizer="sgd", scope="body")
    maps = encodings_of(setup.method, setup.parameters)
    sums = zero_sums(setup.parameters, maps)
    noisy = GaussianMechanism(1.0, 1.0, 60, stream("cpu", 0)).release(sums)
    spiked = next(iter(maps))
    noisy.tensors[spiked][:, 0] += 1.0
    update = setup.method.decode(noisy, 0)
    assert float(update[spiked].norm()) > 1
    assert all(not update[name].any() for name in maps if name != spiked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection": "gausian"}, "no projection called 'gausian'; did you mean 'gaussian'"),
        ({"projection_scale": "paper"}, "projection_scale"),
        ({"embeddings": "frozen"}, "no embeddings called 'frozen'"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"refresh": 0}, "refresh must be 1 or more"),
        ({"reset": True, "decoder": "doppler"}, "not what the decoder doppler carries"),
        ({"reset": True, "decoder": "adambc"}, "not what the decoder adambc carries"),
        ({"reset": True, "decoder": "rmt", "input": "ema"}, "not what the decoder rmt carries"),
    ],
)
def test_bad_settings_are_refused_before_anything_trains(settings, message):
    with pytest.raises(BadInput, match=message):
        spec.resolve({"task": "sst2", "method": "dp-grape", **settings})


def test_lazy_updates_are_applied_a_few_at_a_time_with_the_same_result(monkeypatch):
    monkeypatch.setattr(updates, "_TOGETHER", 10)
    torch.manual_seed(0)
    parameters = {str(n): torch.nn.Parameter(torch.randn(n)) for n in (4, 5, 6, 20, 1)}
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    parts, held = {name: torch.randn(p.shape) for name, p in parameters.items()}, []

    def make(name, part):
        held.append(sum(p.numel() for p in parameters.values() if p.grad is not None))
        return 2 * part

    lazy = updates.LazyUpdates(parts, make)
    for _ in range(3):  # Adam: its state is kept by parameter
        for some, update in ((parameters, lazy), (copies, {name: 2 * part for name, part in parts.items()})):
            optimizer = torch.optim.Adam(some.values(), lr=0.1)
            updates.apply(optimizer, some, update)
    assert all(torch.equal(p, copies[name]) and p.grad is None for name, p in parameters.items())
    assert held == [0, 4, 0, 0, 0] * 3
    assert updates.finite(lazy) and not updates.finite(updates.LazyUpdates({"a": torch.tensor([float("nan")])}, make))


def test_examples_are_let_go_as_soon_as_they_are_encoded():
    """The reference and the check before a run hold no more than the encoded gradients."""
    model, batch = model_for("bert"), batch_for("bert")
    parameters = dict(model.named_parameters())
    maps = encodings_of(method_for(model, rank=1), parameters)
    held, dense = [], Encoding.dense

    def watched(self, gradient):
        held.append(sum(p.grad is not None for p in parameters.values()))
        return dense(self, gradient)

    engine = ReferenceEngine(model, loss, parameters, no_clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoding, "dense", watched)
        _, found = example_gradient(engine, {k: v[:1] for k, v in batch.items()}, maps)
    assert list(found) == list(parameters) and max(held) == 1 and len(held) == len(parameters)
    assert all(found[n].shape == maps[n].shape(p.shape) for n, p in parameters.items() if n in maps)


# --- dp-galore


def test_galore_keeps_the_leading_singular_subspace_of_the_release_at_each_refresh(setup_of):
    setup = setup_of("dp-galore", optimizer="sgd", refresh=2, rank=5, lift_scale=0.5)
    assert encodings_of(setup.method, setup.parameters) == {}, "the release has the full shape"
    setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    leading = {}
    for step in range(3):
        torch.manual_seed(step)
        release = {name: torch.randn(p.shape) for name, p in setup.parameters.items()}
        noisy = GaussianMechanism(0.0, 1.0, 1, stream("cpu", 0)).release({n: t.clone() for n, t in release.items()})
        update = setup.method.decode(noisy, step)
        for name, side in setup.method.sides.items():
            g = release[name].double()
            if step % 2 == 0:
                u, _, v = torch.linalg.svd(g, full_matrices=False)
                leading[name] = v[:5].T @ v[:5] if side else u[:, :5] @ u[:, :5].T
            expected = 0.5 * (g @ leading[name] if side else leading[name] @ g)
            assert torch.allclose(update[name].double(), expected, atol=1e-4), (name, step)
        assert all(torch.equal(update[n], t) for n, t in release.items() if n not in setup.method.sides)
    assert {side for side in setup.method.sides.values()} == {0, 1}


def test_galore_runs_adam_in_its_subspace_and_saves_the_moments_only(setup_of):
    setup = setup_of("dp-galore", rank=8)
    setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    name, releases = next(iter(setup.method.sides)), []
    for step in range(3):
        torch.manual_seed(step)
        sums = {n: torch.randn(p.shape) for n, p in setup.parameters.items()}
        releases.append(sums[name].double())
        update = setup.method.decode(GaussianMechanism(0.0, 1.0, 1, stream("cpu", 0)).release(sums), step)[name]
    v = torch.linalg.svd(releases[0], full_matrices=False)[2][:8].T
    # singular vectors have no sign of their own; what Adam does has none either
    assert torch.allclose(update.double(), adam_by_hand([g @ v for g in releases]) @ v.T, atol=1e-3)
    state = setup.method.state_dict()
    for name, side in setup.method.sides.items():
        p = setup.parameters[name].flatten(1)
        found = {key.split("|")[0]: 0 for key in state}
        for key, t in state.items():
            if key.endswith(f"|{name}"):
                found[key.split("|")[0]] += t.numel()
        assert found == {"subspace": 2 * 8 * max(p.shape), "basis": 8 * p.shape[side]}


def test_galore_of_patch_embeddings():
    model = model_for("vit").float()
    method = method_for(model, name="dp-galore")
    (name,) = [n for n in method.sides if "patch" in n]
    assert method.shapes[name] == (16, 3, 4, 4) and method.sides[name] == 0
    release = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    update = method.decode(GaussianMechanism(0.0, 1.0, 1, stream("cpu", 0)).release(dict(release)), 0)[name]
    assert update.shape == (16, 3, 4, 4) and int(torch.linalg.matrix_rank(update.flatten(1))) == 4


@pytest.mark.parametrize("options", [{"refresh": 2}, {"refresh": 3, "reset": True}, {"refresh": 3, "decoder": "rmt"}])
def test_galore_cut_around_a_refresh_resumes_bit_for_bit(options, setup_of, tmp_path):
    resumes_bit_for_bit("dp-galore", options, setup_of, tmp_path)


def test_galore_refuses_an_adam_of_the_full_space():
    for decoder in ({"decoder": "adambc"}, {"decoder": "muon"}, {"decoder": "rmt", "input": "ema"}):
        with pytest.raises(BadInput, match="dp-galore runs Adam in its subspace"):
            spec.resolve({"task": "sst2", "method": "dp-galore", **decoder})

"""DP-GaLore: subspaces from releases, Adam in them, resuming."""

import pytest
import torch
from asking import answered, encodings_of
from engine_cases import model_for
from grape_cases import adam_by_hand, method_for, resumes_bit_for_bit
from small_runs import silent

from dpft.harness.errors import BadInput
from dpft.harness.runs.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def test_galore_keeps_the_leading_singular_subspace_of_the_release_at_each_refresh(setup_of):
    setup = setup_of("dp-galore", optimizer="sgd", refresh=2, rank=5, lift_scale=0.5)
    assert encodings_of(setup.method, setup.parameters) == {}, "the release has the full shape"
    setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    leading = {}
    for step in range(3):
        torch.manual_seed(step)
        release = {name: torch.randn(p.shape) for name, p in setup.parameters.items()}
        noisy = silent(1).release({n: t.clone() for n, t in release.items()})
        update = answered(setup.method, step, noisy)
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
        update = answered(setup.method, step, silent(1).release(sums))[name]
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
    update = answered(method, 0, silent(1).release(dict(release)))[name]
    assert update.shape == (16, 3, 4, 4) and int(torch.linalg.matrix_rank(update.flatten(1))) == 4


@pytest.mark.parametrize("options", [{"refresh": 2}, {"refresh": 3, "reset": True}, {"refresh": 3, "decoder": "rmt"}])
def test_galore_cut_around_a_refresh_resumes_bit_for_bit(options, setup_of, tmp_path):
    resumes_bit_for_bit("dp-galore", options, setup_of, tmp_path)


def test_galore_refuses_an_adam_of_the_full_space():
    for decoder in ({"decoder": "adambc"}, {"decoder": "muon"}, {"decoder": "rmt", "input": "ema"}):
        with pytest.raises(BadInput, match="dp-galore runs Adam in its subspace"):
            resolve({"task": "sst2", "method": "dp-galore", **decoder})

"""dp-sapf: what each phase asks and moves, that releases alone choose, and that noise favours no size of matrix."""

import pytest
import torch
from asking import answered, recorded
from engine_cases import batch_for, loss, model_for
from small_runs import a_spec, not_private, quiet, silent, stopped, trained, unwatched, weights

from dpft.harness.errors import BadInput
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = {"steps": 6, "warmup_fraction": 0.34, "selection_fraction": 0.34, "eval_every": 3}  # 2, 2 and 2 steps
SPEC = resolve({"task": "sst2", "method": "dp-sapf"})
BATCHES = [list(range(20 * step, 20 * step + 6)) for step in range(6)]


def method_for(model, steps=10, **options):
    model.head_parameters = [n for n, _ in model.named_parameters() if "head" in n or "classifier" in n]
    method = registry.make("dp-sapf", "mean", options)
    method.spec, method.steps = SPEC, steps
    method.prepare(model, torch.Generator().manual_seed(0))
    return method


def probed(method, sums):
    """The layers that are chosen after these releases, each {layer: B's}, in the probe's last steps."""
    first, last = method.borders(method.steps)
    for step, by_layer in zip(range(first, last), sums, strict=True):
        released = silent(1).release({method.adapters[layer]: t.clone() for layer, t in by_layer.items()})
        assert answered(method, step, released) == {}
    return set(method.selected)


def test_each_phase_asks_and_moves_what_it_says(setup_of):
    setup = setup_of("dp-sapf", **PHASES)
    seen = [weights(setup)]
    trains = setup.method.step

    def step(ask, number):
        seen.append(weights(setup))
        return trains(ask, number)

    setup.method.step = step
    found, _ = recorded(setup, BATCHES)
    seen.append(weights(setup))
    method, asked = setup.method, [{n for n, t in one.clean.items() if t.numel()} for one in found]
    adapters = set(setup.parameters) - setup.head
    of_b = {n for n in adapters if "lora_B" in n}
    chosen = {n for n in adapters if n.partition(".lora_")[0] in method.selected}
    assert setup.starts == (0, 2, 4) and len(of_b) == 12 and len(method.selected) == 6
    assert asked[:2] == [setup.head] * 2 and asked[2:4] == [of_b] * 2 and asked[4:] == [chosen | setup.head] * 2
    for before, after, moves in zip(seen[1:-1], seen[2:], [setup.head] * 2 + [set()] * 2 + [None] * 2, strict=True):
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        if moves is not None:
            assert moved == moves
        else:
            assert {n for n in chosen if "lora_B" in n} | setup.head <= moved <= chosen | setup.head
    assert [one.bound for one in found] == [2.0] * 2 + [0.5] * 2 + [2.0] * 2
    assert all(torch.equal(seen[-1][n], seen[0][n]) for n in adapters - chosen)
    assert all(not torch.equal(seen[-1][n], seen[0][n]) for n in chosen), "B no longer 0, A trains, too"
    assert not any(found[0].clean[n].any() for n in of_b if n in asked[0])
    probe = torch.cat([found[2].clean[n].flatten() for n in of_b])
    assert probe.any(), "after a warm-up gradients reach the body"


def test_through_a_head_of_zeros_nothing_could_be_probed(setup_of):
    setup = setup_of("dp-sapf", **PHASES)
    losses = setup.task.loss(setup.prepared.model, setup.prepared.collate(setup.prepared.train[:6]))
    of_b = [p for n, p in setup.parameters.items() if "lora_B" in n]
    found = torch.autograd.grad(losses.sum(), of_b, allow_unused=True)
    assert not any(g is not None and g.any() for g in found)


def test_the_score_is_the_matrix_gradient_through_a_random_projection():
    """Without noise: || (alpha/r) G A^T || / sqrt(entries), G by autograd on the model without adapters."""
    plain, batch = model_for("bert").double(), batch_for("bert")
    found = {}
    total = loss(plain, batch).sum()
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "head":
            (found[name],) = torch.autograd.grad(total, module.weight, retain_graph=True, allow_unused=True)
    model = model_for("bert").double()
    method = method_for(model, rank=4, alpha=12, selected_fraction=0.3)
    parameters = dict(model.named_parameters())
    model.load_state_dict(
        {n.replace(".weight", ".base_layer.weight") if n.replace(".weight", "") in found else n: p
         for n, p in plain.state_dict().items()}, strict=False,
    )  # fmt: skip
    scores = {}
    for layer, name in method.adapters.items():
        g, a = found[layer], parameters[name.replace("lora_B", "lora_A")]
        scores[layer] = 0.0 if g is None else float((3 * g @ a.detach().mT).square().mean())
    sums = dict(zip(method.adapters, torch.autograd.grad(
        loss(model, batch).sum(), [parameters[n] for n in method.adapters.values()], allow_unused=True
    ), strict=True))  # fmt: skip
    sums = {n: torch.zeros_like(parameters[method.adapters[n]]) if t is None else t for n, t in sums.items()}
    best = sorted(scores, key=scores.get)[-round(0.3 * len(scores)) :]
    assert probed(method, [sums]) == set(best) and len(best) > 2


def test_noise_alone_favours_no_size_and_releases_decide():
    model = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(6, 800 if i < 4 else 40) for i in range(8)})
    model["head"] = torch.nn.Linear(4, 2)
    large = chosen = 0
    for seed in range(40):
        method = method_for(model_copy(model), selected_fraction=0.5)
        noise = torch.Generator().manual_seed(seed)
        sums = {n: torch.randn(800 if int(n[1]) < 4 else 40, 8, generator=noise) for n in method.adapters}
        picked = probed(method, [sums])
        large, chosen = large + sum(int(n[1]) < 4 for n in picked), chosen + len(picked)
        method = method_for(model_copy(model), selected_fraction=0.125)
        sums["l6"] += 2.0
        assert probed(method, [sums]) == {"l6"}, "signal in a small matrix, though the norms of the large are larger"
        assert sums["l6"].norm() < sums["l0"].norm()
    assert 0.35 < large / chosen < 0.65


def model_copy(model):
    import copy

    return copy.deepcopy(model)


def test_releases_of_several_steps_are_averaged_before_their_norm_is_taken():
    """Noise that changes its sign says nothing; a release that comes again does."""
    model = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(6, 6) for i in range(4)} | {"head": torch.nn.Linear(4, 2)})
    method = method_for(model, steps=10, selection_fraction=0.2, selected_fraction=0.25)
    first = {n: torch.full((6, 8), 10.0 if n != "l2" else 1.0) for n in method.adapters}
    second = {n: t if n == "l2" else -t for n, t in first.items()}
    assert probed(method, [first, second]) == {"l2"}


def test_a_run_cut_in_the_probe_resumes_bit_for_bit(setup_of, tmp_path):
    whole = setup_of("dp-sapf", **PHASES)
    made, path = trained(whole), tmp_path / "run.ckpt"
    with unwatched():
        stopped(setup_of("dp-sapf", path, **PHASES), 4)
    resumed = setup_of("dp-sapf", path, **PHASES)
    assert trained(resumed, watched=False).progress.curve == made.progress.curve
    assert resumed.method.selected == whole.method.selected
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_noise_chooses_others_and_targets_may_be_named(setup_of):
    chosen = set()
    for make in (not_private, lambda setup: setup):
        setup = make(setup_of("dp-sapf", selected_fraction=0.2, targets="query,key,dense", epsilon=0.2))
        recorded(setup, BATCHES[:4])
        chosen.add(frozenset(setup.method.selected))
        assert {name.rpartition(".")[2] for name in setup.method.adapters} == {"query", "key", "dense"}
    assert len(chosen) == 2


def test_the_ledger_is_that_of_dp_lora(tiny_bert, settings):
    one, other = (run.execute(a_spec(m, tiny_bert), settings, quiet)[0]["privacy"] for m in ("dp-sapf", "dp-lora"))
    assert one["ledger"] == other["ledger"] and one["epsilon"] == other["epsilon"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2}, "would spend 2 of 2 steps before it trains adapters"),
        ({"selected_fraction": 0.0}, "selected_fraction must be between"),
        ({"decoder": "rmt"}, "leave out decoder=rmt"),
        ({"mechanism": "laplace"}, "leave out mechanism=laplace"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "dp-sapf", **settings})

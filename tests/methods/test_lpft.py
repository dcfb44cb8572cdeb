"""lp-ft: what each stage asks and moves, where moments and learning rates change, and that its ends are other methods."""

import pytest
import torch
from asking import recorded
from small_runs import a_spec, not_private, quiet, trained, weights

from dpft.harness.errors import BadInput
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = [list(range(20 * step, 20 * step + 6)) for step in range(4)]


def weights_by_step(setup):
    seen = [weights(setup)]
    made = trained(setup, lambda step, row: seen.append(weights(setup)))
    return seen, made


def test_the_body_waits_and_then_begins_with_adams_first_step(setup_of):
    setup = setup_of("lp-ft", epsilon=1.0)
    seen, made = weights_by_step(setup)
    body = [name for name in setup.parameters if name not in setup.head]
    assert setup.starts == (0, 2) and [setup.method.kind(s) for s in (1, 2)] == ["probing", "training"]
    assert all(torch.equal(seen[2][n], seen[0][n]) for n in body), "frozen to the bit while the head is probed"
    lr = setup.spec.lr
    for name in body:  # Adam's first step is lr * sign, whatever the release; of another count it is not
        moved = (seen[3][name] - seen[2][name]).abs()
        assert float(moved.median()) == pytest.approx(lr, rel=1e-2), name
    for name in setup.head:
        first, later = (seen[s + 1][name] - seen[s][name] for s in (0, 2))
        assert float(first.abs().median()) == pytest.approx(300 * lr, rel=1e-2)
        assert later.any() and float(later.abs().max()) < 110 * lr
    assert len(made.progress.ledger.events) == 1, "one noise multiplier for both stages"


def test_the_head_has_the_learning_rate_of_its_stage_and_alone_is_noised_while_it_is_probed(setup_of):
    setup = setup_of("lp-ft", optimizer="sgd", lr=0.5, probe_lr_factor=4.0, head_lr_factor=2.0)
    before, seen = weights(setup), []
    trains = setup.method.step

    def step(ask, number):
        seen.append(weights(setup))
        return trains(ask, number)

    setup.method.step = step
    found, _ = recorded(setup, BATCHES)
    seen.append(weights(setup))
    for number, one in enumerate(found):
        asked = {name for name, tensor in one.clean.items() if tensor.numel()}
        assert asked == (setup.head if number < 2 else set(setup.parameters))
        for name in asked:
            factor = 1.0 if name not in setup.head else 4.0 if number < 2 else 2.0
            moved = seen[number][name] - 0.5 * factor * one.noisy.tensors[name]
            assert torch.allclose(seen[number + 1][name], moved, atol=1e-6)
    assert all(not torch.equal(seen[-1][name], before[name]) for name in setup.parameters)


@pytest.mark.parametrize("fraction, other", [(0.0, "dp-adam"), (1.0, "last-layer")])
def test_its_ends_are_other_methods(fraction, other, setup_of):
    found = []
    for method, more in (("lp-ft", {"probe_fraction": fraction, "lr": 1e-4}), (other, {})):
        setup = not_private(setup_of(method, **more))
        recorded(setup, BATCHES)
        found.append(weights(setup))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-5, atol=1e-7), name


def test_the_ledger_is_that_of_dp_adam(tiny_bert, settings):
    one, other = (run.execute(a_spec(m, tiny_bert), settings, quiet)[0]["privacy"] for m in ("lp-ft", "dp-adam"))
    assert one["ledger"] == other["ledger"] and one["epsilon"] == other["epsilon"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe_fraction": 1.5}, "probe_fraction must be between 0 and 1"),
        ({"decoder": "rmt"}, "leave out decoder=rmt"),
        ({"mechanism": "laplace"}, "leave out mechanism=laplace"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "lp-ft", **settings})
    resolve({"task": "sst2", "method": "lp-ft", "mechanism": "laplace", "noise_shape": "coordinates"})

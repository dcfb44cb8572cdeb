"""What the tests of projected training share."""

import torch
from small_runs import stopped, trained, weights

from dpft.harness.runs import registry


def method_for(model, seed=0, name="dp-grape", head=("head.weight", "head.bias"), **options):
    """The method, prepared for a model of engine_cases."""
    model.head_parameters = list(head)
    method = registry.make(name, "mean", {"rank": 4, **options})
    method.prepare(model, torch.Generator().manual_seed(seed))
    return method


def adam_by_hand(releases, resets=()):
    first = second = seen = 0
    for step, release in enumerate(releases):
        if step in resets:
            first = second = seen = 0
        seen += 1
        first, second = 0.9 * first + 0.1 * release, 0.999 * second + 0.001 * release**2
    return (first / (1 - 0.9**seen)) / ((second / (1 - 0.999**seen)).sqrt() + 1e-8)


def resumes_bit_for_bit(method, options, setup_of, tmp_path):
    whole = setup_of(method, **options)
    made = trained(whole)
    path, seen = tmp_path / "run.ckpt", []
    stopped(setup_of(method, path, **options))
    resumed = setup_of(method, path, **options)
    again = trained(resumed, lambda step, row: seen.append(step))
    assert seen == [3, 4] and again.progress.curve == made.progress.curve
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())

"""Runs of four steps on the tiny BERT, for the tests that need the real loop."""

from dpft.harness.runs.resolve import resolve
from dpft.harness.train import loop

SIZE = dict(task="sst2", batch_size=60, steps=4, eval_every=2, epsilon=3.0, max_length=32)


def a_spec(method, tiny_bert, **more):
    return resolve({"method": method, "model": str(tiny_bert), **SIZE, **more})


def quiet(step, row):
    pass


def weights(setup):
    return {name: p.detach().clone() for name, p in setup.prepared.model.named_parameters()}


def trained(setup):
    state = loop.State()
    loop.train(setup, state, quiet)
    return state

"""DP-KFC: what the factors are, what is clipped, and that probing leaves no trace."""

import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from asking import answered, first
from small_runs import silent
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dpft.harness.engine import NAMES, engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import CannotRun
from dpft.harness.probes import Clock
from dpft.harness.query.kronecker import kronecker_factors
from dpft.harness.query.public import Public
from dpft.harness.runs import registry
from dpft.methods.kfac import AT_ONCE

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.mix = nn.Embedding(9, 4), nn.Linear(4, 6), Conv1D(5, 6)
        self.norm, self.out, self.act = nn.LayerNorm(5), nn.Linear(5, 3), torch.relu_

    def forward(self, ids, mask):
        hidden = self.norm(self.act(self.mix(torch.tanh(self.body(self.table(ids))))))
        return self.out((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def loss(model, batch):
    scores = model(batch["input_ids"], batch["mask"].to(model.table.weight.dtype))
    return F.cross_entropy(scores, batch["labels"], reduction="none")


def collate(examples):
    longest = max(len(e["input_ids"]) for e in examples)
    padded = [numpy.pad(e["input_ids"], (0, longest - len(e["input_ids"]))) for e in examples]
    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    made = {"input_ids": numpy.stack(padded), "mask": numpy.array(mask), "labels": [e["labels"] for e in examples]}
    return {name: torch.tensor(value) for name, value in made.items()}


def examples(count):
    random = numpy.random.default_rng(0)
    return [
        {"input_ids": numpy.array([7, *random.integers(1, 9, random.integers(1, 5)), 8]), "labels": i % 3}
        for i in range(count)
    ]


def made(**options):
    torch.manual_seed(0)
    model = Small()
    method = registry.make("dp-kfc", "mean", {"examples": 40, **options})
    method.public, method.spec = Public(examples(40), collate, loss, CPU), SimpleNamespace(max_length=8)
    method.prepare(model, torch.Generator().manual_seed(1))
    return model, method


def begun(**options):
    """After the first step, with the question of the second."""
    model, method = made(**options)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    answered(method, 0, silent(40).release(zeros))
    return model, method, first(method, 1)["gradient"]


def by_hand(model):
    """By layer: (A, S), one example at a time, without padding."""
    seen = {name: ([], []) for name in ("body", "mix", "out")}
    for one in examples(40):
        kept = {}

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept[module] = (args[0].detach(), output)
            return output.clone()  # what follows works in place

        handles = [getattr(model, name).register_forward_hook(keep) for name in seen]
        loss(model, collate([one])).sum().backward()
        for name, (a, e) in seen.items():
            inputs, output = kept[getattr(model, name)]
            a.append(inputs.reshape(-1, inputs.shape[-1]))
            e.append(output.grad.reshape(-1, output.shape[-1]))
        for handle in handles:
            handle.remove()
        model.zero_grad()
    rows = {name: (torch.cat(a).double(), torch.cat(e).double()) for name, (a, e) in seen.items()}
    rows = {name: (a[e.any(1)], e[e.any(1)]) for name, (a, e) in rows.items()}  # tokens that an act of 0 cuts off
    return {name: (a.T @ a / len(a), e.T @ e / len(e)) for name, (a, e) in rows.items()}


def test_the_sides_whiten_the_factors_of_the_probes_and_keep_their_energy():
    model, _, question = begun(damping=0.05)
    factors, encodings = by_hand(model), question.encodings
    assert set(encodings) == {f"{n}.{own}" for n in factors for own in ("weight", "bias")}
    before = after = 0.0
    roots = {}
    for name, pair in factors.items():
        roots[name] = []
        for m in pair:
            damped = m + 0.05 * m.trace() / len(m) * torch.eye(len(m))
            values, vectors = torch.linalg.eigh(damped)
            roots[name].append(vectors @ torch.diag(values**-0.5) @ vectors.T)
        (a, s), (ua, us) = pair, roots[name]
        before += (a.trace() + 1) * s.trace()
        after += ((ua @ a @ ua).trace() + 1) * (us @ s @ us).trace()
    scale = (before / after).sqrt()
    for name, (ua, us) in roots.items():
        weight, bias = encodings[f"{name}.weight"], encodings[f"{name}.bias"]
        gradients, inputs = (weight.right, weight.left) if name == "mix" else (weight.left, weight.right)
        torch.testing.assert_close(inputs.double(), ua, rtol=1e-3, atol=1e-3 * float(ua.abs().max()))
        torch.testing.assert_close(
            gradients.double(), scale * us, rtol=1e-3, atol=1e-3 * float((scale * us).abs().max())
        )
        assert bias.left is gradients and bias.right is None


@pytest.mark.parametrize("name", NAMES)
def test_the_whitened_gradient_is_what_is_clipped_on_every_engine_and_probing_leaves_no_trace(name):
    """The engine's hooks are on the model while it is probed."""
    model, method = made()
    if name == "opacus":  # has no rule for Conv1D, and takes nothing that works in place
        model.mix, model.act = nn.Linear(6, 5), torch.relu
        method.prepare(model, torch.Generator().manual_seed(1))
    answered(method, 0, silent(40).release({n: torch.zeros_like(p) for n, p in model.named_parameters()}))
    engine = engine_class(name)(model, loss, dict(model.named_parameters()), Clock(CPU))
    hooks = [len(m._forward_hooks) for m in model.modules()]
    model.train()
    model.norm.eval()
    question = first(method, 1)["gradient"]
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert model.training and not model.norm.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train()
    batch = collate(examples(6))
    expected, norms = {n: 0.0 for n, _ in model.named_parameters()}, []
    for i in range(6):
        with engine.plain():
            value = loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0]
            found = dict(zip(expected, torch.autograd.grad(value, list(model.parameters())), strict=True))
        for n, e in question.encodings.items():
            left = found[n] if e.left is None else e.left.T @ found[n]
            found[n] = left if e.right is None else left @ e.right
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in found.values())))
        expected = {n: expected[n] + g * min(1.0, 0.5 / norms[-1]) for n, g in found.items()}
    for p in model.parameters():
        p.grad = None
    total = zero_sums(engine.parameters, question.encodings)
    _, measured = engine.accumulate(batch, total, 0.5, question.encodings)
    engine.close()
    assert measured[:, 0].tolist() == pytest.approx(norms, rel=1e-4)
    largest = max(float(g.norm()) for g in expected.values())
    for n, g in expected.items():
        assert float((total[n] - g).norm()) <= 1e-4 * largest, n


def test_the_first_step_is_that_of_dp_adam_and_sides_hold_for_a_while_and_through_a_resume():
    model, method, question = begun(refresh=3)
    assert first(made()[1], 0)["gradient"].encodings == {}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    kept = {n: e.left for n, e in first(method, 3)["gradient"].encodings.items()}
    assert all(torch.equal(kept[n], e.left) for n, e in question.encodings.items())
    other = made(refresh=3)[1]
    other.load_state_dict(method.state_dict())
    for n, e in first(other, 3)["gradient"].encodings.items():
        assert torch.equal(e.left, kept[n]) and e.left.stride() == kept[n].stride()  # another order rounds differently
        assert e.right is None or torch.equal(e.right, question.encodings[n].right)
    anew = first(method, 4)["gradient"].encodings
    assert not any(torch.equal(anew[n].left, kept[n]) for n in kept)


def test_a_head_at_zero_stops_gradients_and_what_they_do_not_reach_is_left_as_it_is():
    model, method = made()
    nn.init.zeros_(model.out.weight)
    assert set(method._whitened(kronecker_factors(method.public, model, method._layers, method._batches(1)))) == {
        "out.weight",
        "out.bias",
    }


def test_probes_of_random_tokens_are_as_long_as_examples_may_be_and_the_same_again():
    _, method = made(probe="tokens")
    batches = list(method._batches(1))
    assert [len(b["labels"]) for b in batches] == [AT_ONCE, 40 - AT_ONCE]
    lengths = torch.cat([b["mask"].sum(1) for b in batches])
    assert int(lengths.min()) >= 3 and int(lengths.max()) == 8 and len(set(lengths.tolist())) > 3
    for batch in batches:
        last = batch["mask"].sum(1, keepdim=True) - 1
        assert (batch["input_ids"][:, 0] == 7).all() and (batch["input_ids"].gather(1, last) == 8).all()
        assert set(batch["labels"].tolist()) <= {0, 1, 2}
    again, later = list(method._batches(1)), list(method._batches(51))
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(batches, again, strict=True))
    assert not torch.equal(batches[0]["labels"], later[0]["labels"])


def test_lifting_is_the_way_back_by_the_same_sides():
    _, method, question = begun(lift=True)
    released = {n: torch.randn(shape) for n, shape in method._shapes.items()}
    update = answered(method, 1, silent(40).release({n: 40 * t for n, t in released.items()}))
    e = question.encodings["body.weight"]
    torch.testing.assert_close(update["body.weight"], e.left @ released["body.weight"] @ e.right.T)
    torch.testing.assert_close(update["body.bias"], e.left @ released["body.bias"])
    assert torch.equal(update["norm.weight"], released["norm.weight"])


def test_images_have_no_tokens():
    with pytest.raises(CannotRun, match="random tokens are for tasks of text"):
        _, method = made()
        method.settings["probe"] = "tokens"
        method.public = Public([{"x": 0.0, "labels": 0}], collate, loss, CPU)
        method.prepare(Small(), torch.Generator())


def test_a_model_without_linear_layers_is_skipped():
    assert "the model has none" in made()[1].skip(nn.Conv1d(2, 2, 1))

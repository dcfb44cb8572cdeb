"""Clipping functions and groups: by hand, in every engine, and the bound on one example's whole contribution."""

import math

import pytest
import torch
from engine_cases import assert_same, batch_for, clipped, model_for

from dpft.harness.engine import NAMES
from dpft.harness.engine.clipping import FUNCTIONS, Clipping
from dpft.harness.errors import BadInput
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import CLIP_GROUPS

C = 0.3
PUBLISHED = {
    "abadi": lambda n, bound: min(1, bound / n),
    "auto-s": lambda n, bound: bound / (n + 0.01),
    "psac": lambda n, bound: bound / (n + 0.01 / (n + 0.01)),
}


def squared(tensors):
    return sum(float(t.double().square().sum()) for t in tensors)


def by_hand(model, batch, clipping):
    """Per-example gradients by autograd, each group scaled on its own; also the norms, [batch, groups]."""
    names = dict(model.named_parameters())
    members = clipping.grouped(names)
    total = {name: torch.zeros_like(p) for name, p in names.items()}
    norms = []
    for i in range(len(batch["labels"])):
        model.zero_grad()
        logits = model(**{k: v[i : i + 1] for k, v in batch.items() if k != "labels"})
        torch.nn.functional.cross_entropy(logits, batch["labels"][i : i + 1]).backward()
        found = [math.sqrt(squared(names[n].grad for n in group)) for group in members.values()]
        for norm, group in zip(found, members.values(), strict=True):
            factor = PUBLISHED[clipping.function](norm, C / math.sqrt(len(members)))
            for n in group:
                total[n] += factor * names[n].grad
        norms.append(found)
    model.zero_grad(set_to_none=True)
    return total, torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("groups", CLIP_GROUPS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("engine", NAMES)
def test_every_engine_clips_as_published(engine, function, groups):
    model, batch, clipping = model_for("bert"), batch_for("bert"), Clipping(function, groups)
    expected, norms = by_hand(model, batch, clipping)
    found, _, found_norms = clipped(engine, model, batch, C, clipping=clipping)
    assert torch.allclose(found_norms, norms, rtol=1e-9)
    assert_same(found, expected, 1e-9)


def test_groups_are_blocks_and_layers():
    names = ["e.layer.0.q.weight", "e.layer.0.q.bias", "e.layer.0.k.weight", "e.layer.1.q.weight", "head.weight"]
    assert list(Clipping(groups="flat").grouped(names)) == [""]
    assert list(Clipping(groups="block").grouped(names)) == ["e.layer.0", "e.layer.1", ""]
    assert list(Clipping(groups="layer").grouped(names).values())[0] == names[:2]
    assert len(Clipping(groups="layer").grouped(names)) == 4


@pytest.mark.parametrize("groups", CLIP_GROUPS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_example_contributes_at_most_the_clip_norm(function, groups):
    model, clipping = model_for("bert", torch.float32), Clipping(function, groups)
    for seed in range(3):
        batch = {key: value[seed : seed + 1] for key, value in batch_for("bert").items()}
        for clip_norm in (1e-3, 0.1, 10.0):
            total, _, _ = clipped("factored", model, batch, clip_norm, clipping=clipping)
            assert math.sqrt(squared(total.values())) <= clip_norm * (1 + 1e-6)
            members = clipping.grouped(total)
            for names in members.values():
                assert math.sqrt(squared(total[n] for n in names)) <= clip_norm / math.sqrt(len(members)) * (1 + 1e-6)


def test_a_group_is_added_to_the_sum_while_backward_is_still_running():
    """Per-layer clipping needs no second look: that is its memory advantage."""
    model, seen = model_for("bert"), []

    class Watching(Clipping):
        def factors(self, *arguments):
            seen.append(phases[-1])
            return super().factors(*arguments)

    phases = []
    clipped("factored", model, batch_for("bert"), C, clipping=Watching(groups="layer"), clock=recording(phases))
    groups = Clipping(groups="layer").grouped(dict(model.named_parameters()))
    assert seen[: len(groups)] == ["backward"] * len(groups)


def recording(phases):
    import contextlib

    @contextlib.contextmanager
    def clock(phase):
        if phase != "clip":
            phases.append(phase)
        yield
        if phase == "backward":
            phases.append("after")

    return clock


def test_unknown_names_are_refused_with_the_nearest():
    base = {"task": "sentences", "method": "dp-adam"}
    assert resolve({**base, "clipping": "auto-s", "clip_groups": "layer"}).run_id != resolve(base).run_id
    assert resolve({**base, "clipping": "abadi", "clip_groups": "flat"}).run_id == resolve(base).run_id
    with pytest.raises(BadInput, match="auto-s"):
        resolve({**base, "clipping": "auto"})
    with pytest.raises(BadInput, match="layer"):
        resolve({**base, "clip_groups": "layers"})

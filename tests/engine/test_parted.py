"""Frozen weights in parts: a model computes what it did, holds one block at a time, and NaN where nobody has gathered."""

import copy

import pytest
import torch
from torch import nn

from dpft.harness.engine import parted, rules
from dpft.harness.train import buffers, lending, ranks

COUNT = 3


class Net(nn.Module):
    """Blocks, a table that is tied to the output, weights of two types, and a small adapter that trains in every block."""

    head_parameters = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"wide": nn.Linear(16, 16), "adapter": nn.Linear(16, 16)}) for _ in range(3)
        )
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.table.weight
        for name, p in self.named_parameters():
            p.requires_grad_("adapter" in name)

    def forward(self, tokens):
        hidden = self.table(tokens).mean(1)
        for block in self.blocks:
            hidden = torch.tanh(block["wide"](hidden)) + block["adapter"](hidden)
        return self.out(hidden * self.scale.float()).logsumexp(1)


def in_parts(model, count=COUNT):
    """(copies of the model, each of which holds one part, what each is parted into): they gather from one another."""
    copies, made = [copy.deepcopy(model) for _ in range(count)], []

    def gather(number, room):
        room.copy_(torch.cat([one.blocks[number].own for one in made]))

    for place, one in enumerate(copies):
        made.append(parted.part(one, torch.device("cpu"), place, count, gather))
    return copies, made


TOKENS = torch.arange(12).view(4, 3)


def gradients(model, blocks=None):
    def run(model, tokens):
        return model(tokens)

    if blocks is not None:
        with blocks.saving():
            losses = run(model, TOKENS)
    else:
        losses = run(model, TOKENS)
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_computed_stays_the_same_to_the_bit():
    plain = Net()
    losses, expected = gradients(plain)
    copies, made = in_parts(Net())
    for model, blocks in zip(copies, made, strict=True):
        found, theirs = gradients(model, blocks)
        assert torch.equal(found, losses)
        assert all(torch.equal(theirs[name], expected[name]) for name in expected)


def test_every_byte_is_in_one_part_and_the_parts_are_alike_in_size():
    plain = Net()
    copies, made = in_parts(Net())
    for name, p in plain.named_parameters():
        own = [parted.held(one.get_parameter(name)) for one in copies]
        if p.requires_grad or name == "scale":  # it is small
            assert all(torch.equal(t, p) for t in own)
        else:
            assert torch.equal(torch.cat(own), p.detach().flatten().view(torch.uint8))
            assert all(model.get_parameter(name).isnan().all() for model in copies)
    total = sum(p.nbytes for p in plain.parameters() if not p.requires_grad)
    assert all(sum(len(block.own) for block in one.blocks) < total / COUNT + 64 * 5 for one in made)


def test_one_block_is_there_at_a_time_on_the_way_back_too(monkeypatch):
    copies, made = in_parts(Net())
    there, bring = [], parted.Parted._bring

    def noting(self, block):
        found = bring(self, block)
        there.append([one.number for one in self.blocks if one.room is not None])
        return found

    monkeypatch.setattr(parted.Parted, "_bring", noting)
    gradients(copies[0], made[0])
    assert all(len(numbers) == 1 for numbers in there)
    order = [number for [number], [before] in zip(there[1:], there, strict=False) if number != before]
    assert order == [1, 2, 3, 0, 3, 2], "forward with the tied table last, and back to where nothing before it trains"


def test_autograd_keeps_no_weights():
    copies, made = in_parts(Net())
    with made[0].saving():
        losses = copies[0](TOKENS)
    made[0].let_go()
    assert not made[0]._rooms, "nothing is gathered between the passes"
    losses.sum().backward()


def test_an_error_in_a_call_leaves_no_block_held():
    copies, made = in_parts(Net())
    with pytest.raises(IndexError):
        copies[0](torch.full((1, 3), 77))
    made[0].let_go()
    assert all(block.room is None and not block.calls for block in made[0].blocks)


def test_weights_are_widened_one_block_at_a_time():
    plain, (copies, made) = Net(), in_parts(Net())
    expected = plain.double()(TOKENS)
    with parted.widened(copies[0], torch.float64):
        assert {p.dtype for p in copies[0].parameters() if not p.requires_grad} == {torch.float64}
        for block in copies[0].blocks:
            block["adapter"].double()
        assert torch.equal(copies[0](TOKENS), expected)
    assert copies[0].table.weight.dtype == torch.float32 and copies[0].table.weight.isnan().all()
    assert made[0].blocks[0].kinds == [torch.float32]


def test_its_state_is_what_this_process_holds():
    """A gathered block is no change, and a change of the part is one."""
    copies, made = in_parts(Net())
    before = buffers.fingerprint(copies[1], weights=True)
    with parted.whole(copies[1]):
        assert buffers.changed(before, copies[1]) == []
    made[1].blocks[0].own[7] += 1
    assert "parameter table.weight's values" in buffers.changed(before, copies[1])


def test_a_layer_keeps_the_rule_of_its_type():
    copies, _ = in_parts(Net())
    block = copies[0].blocks[0]
    assert rules.rule_for("wide", block["wide"]) is rules.rule_for("wide", nn.Linear(2, 2))
    own = nn.Linear(2, 2)
    own.forward = own.forward
    assert rules.rule_for("own", own) is rules.alone


def test_a_model_of_which_all_trains_is_not_parted():
    model = Net().requires_grad_(True)
    assert parted.part(model, torch.device("cpu"), 0, 2, None) is None


class Reading(Net):
    """It reads a weight without calling its layer."""

    def forward(self, tokens):
        return super().forward(tokens) + self.blocks[0]["wide"].weight.sum()


def test_a_model_that_reads_weights_outside_of_their_layers_is_refused(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(ranks, "here", lambda: ranks.Ranks())
    model = Reading()
    spec = SimpleNamespace(model="reading", method="some")
    lending.part(model, spec, torch.device("cpu"))
    prepared = SimpleNamespace(collate=lambda rows: {"tokens": torch.stack(rows)}, validation=list(TOKENS))
    with pytest.raises(
        lending.CannotRun, match="reading .* reads some of them outside of their layers; leave out --shard"
    ):
        lending.light(lambda model, batch: model(**batch), model, prepared, torch.device("cpu"), spec)

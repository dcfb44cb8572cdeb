"""The hash chain over ledger, curve and releases: what a record without torch can be held against."""

import copy
import dataclasses
import json
import random

import numpy
import pytest
import torch
from forged_cases import renamed
from mutations import mutated
from small_runs import a_spec, quiet

from dpft.harness.privacy.claims_alike import Claims
from dpft.harness.records import chain, verifying
from dpft.harness.records.digest import digest
from dpft.harness.records.store import Store
from dpft.harness.records.verifying import verify_folder, verify_run
from dpft.harness.train import run


@pytest.fixture(scope="module")
def made(tiny_bert, mirror, tmp_path_factory):
    """(folder, record, rows) of private runs and one that is not, as `dpft run` writes them: by name."""
    from dpft.harness.train.settings import Settings

    store, found = Store(tmp_path_factory.mktemp("runs")), {}
    store.open_for_writing()
    for name, method in (("private", "dp-lora"), ("public", "non-private")):
        record, curve = run.execute(a_spec(method, tiny_bert), Settings(data_dir=mirror), quiet)
        store.write(record, curve)
        run_id = record["run_id"]
        found[name] = json.loads(store.record_path(run_id).read_text()), store.curve(run_id).rows(named=True)
    return store.folder, found


def test_new_runs_have_a_chain_that_follows_from_their_files(made):
    folder, found = made
    verdicts = verify_folder(folder)
    assert all((one.findings, one.notices) == ([], []) for one in verdicts.values())
    for record, rows in found.values():
        *steps, value = chain.values(record, rows)
        assert record["chain"] == {"version": 1, "value": value} and len(set(steps)) == len(rows) + 1
    private, public = found["private"], found["public"]
    assert len({row["release"] for row in private[1]}) == 4 and {row["release"] for row in public[1]} == {None}


def edit_row(step, **changes):
    return lambda record, rows: rows[step].update(changes)


def edit_spec(**changes):
    def forge(record, rows):
        record["spec"].update(changes)
        renamed(record, rows)

    return forge


def edit_result(**changes):
    return lambda record, rows: record["result"].update(changes)


CHAINED = {
    "a loss": edit_row(1, loss=0.5),
    "a release": edit_row(2, release="0" * 32),
    "the seed": edit_spec(seed=7),
    "the method": edit_spec(method="ffa-lora"),
    "the clip norm": edit_spec(clip_norm=1e6),
    "the optimizer": edit_spec(optimizer="sgd"),
    "the data": lambda record, rows: record["provenance"].update(data_fingerprint="0" * 64),
    "the model": lambda record, rows: record["provenance"].update(model_fingerprint="1" * 64),
    "another metric": lambda record, rows: record["result"]["all_metrics"].update(f1=0.5),
    "the value": lambda record, rows: record["chain"].update(value="0" * 64),
    "no chain": lambda record, rows: record.update(chain=None),
    "no releases": lambda record, rows: [row.update(release=None) for row in rows],
    "another version": lambda record, rows: record["chain"].update(version=2),
    "a chain of another type": lambda record, rows: record.update(chain=[1]),
}


@pytest.mark.parametrize("name", CHAINED)
def test_what_only_the_chain_sees_is_found(name, made):
    record, rows = copy.deepcopy(made[1]["private"])
    CHAINED[name](record, rows)
    findings = verify_run(record, rows).findings
    assert len(findings) == 1 and ("chain" in findings[0] or "digest" in findings[0] or "noise of" in findings[0]), (
        findings
    )


def leaves(value):
    """(holder, key) of every number, text and flag inside."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, (dict, list)):
            yield from leaves(inner)
        else:
            yield value, key


@pytest.mark.parametrize("section", ["rows", "result", "spec", "ledger"])
def test_the_chain_is_over_every_entry(section, made):
    record, rows = copy.deepcopy(made[1]["private"])
    parts = {"rows": rows, "result": record["result"], "spec": record["spec"], "ledger": record["privacy"]["ledger"]}
    seen = 0
    for holder, key in leaves(parts[section]):
        old, *_, end = holder[key], *chain.values(record, rows)
        assert end == record["chain"]["value"]
        holder[key] = 7.5 if old is None or isinstance(old, str) else old + 1
        try:
            assert list(chain.values(record, rows))[-1] != end or (section, key) == ("ledger", "step_to"), key
        finally:
            holder[key] = old
        seen += 1
    assert seen >= 8


@pytest.mark.parametrize("name", ["private", "public"])
def test_no_mutation_of_a_run_with_a_chain_escapes(name, made):
    record, rows = made[1][name]
    rng, claims = random.Random(name), Claims()
    for _ in range(150):
        forgery, curve, where, needed = mutated(record, rows, rng)
        found = verifying._verify(json.loads(json.dumps(forgery)), curve, claims)
        assert found.findings or not needed, where


def test_a_private_run_of_a_newer_noise_stream_must_have_one(made):
    record, _ = copy.deepcopy(made[1]["private"])
    record["spec"]["noise_stream"] = 2
    assert chain.is_needed(record)
    assert not chain.is_needed({"privacy": None, "spec": record["spec"]})
    assert not chain.is_needed({"privacy": {}, "spec": {}})


def test_times_are_not_in_it_and_the_batches_are(tiny_bert, settings):
    records = [run.execute(a_spec("last-layer", tiny_bert), settings, quiet)[0] for _ in range(2)]
    assert records[0]["chain"] == records[1]["chain"] and records[0]["cost"] != records[1]["cost"]
    smaller = dataclasses.replace(settings, max_tokens=64)
    other = run.execute(a_spec("last-layer", tiny_bert, seed=1), smaller, quiet)[0]
    assert other["chain"] != records[0]["chain"]


def test_a_run_that_is_not_done_has_none(tiny_bert, settings):
    hurried = dataclasses.replace(settings, timeout=1e-9)
    record, _ = run.execute(a_spec("last-layer", tiny_bert), hurried, quiet)
    assert record["status"] == "timeout" and record["chain"] is None
    assert verify_run(json.loads(json.dumps(record)), None).findings == []


def by_hand(tensor):
    """The column sums of a tensor's bits as 64-bit integers, in numpy, and the bytes that are left."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    whole = len(content) // 512 * 512
    rows = numpy.frombuffer(content[:whole], "<i8").reshape(-1, 64)
    with numpy.errstate(over="ignore"):
        return [*rows.sum(0, dtype=numpy.int64).tolist(), *content[whole:]]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_digest_is_of_every_bit_by_name_and_shape(kind):
    import hashlib

    tensors = {"b": torch.randn(50, 41), "a": torch.randn(7), "empty": torch.zeros(0, 3), "one": torch.randn(())}
    tensors = {name: tensor.to(kind) for name, tensor in tensors.items()}
    about = "\n".join(f"{name} {list(tensors[name].shape)} {kind}" for name in sorted(tensors))
    sums = [value for name in sorted(tensors) for value in by_hand(tensors[name])]
    expected = hashlib.sha256(about.encode() + b"\n" + numpy.array(sums, "<i8").tobytes()).hexdigest()[:32]
    assert digest(tensors) == expected == digest(dict(reversed(tensors.items())))
    padded = torch.cat([torch.zeros(1, dtype=kind), tensors["b"].view(-1)])[1:].view(50, 41)  # starts at an odd place
    assert digest({**tensors, "b": padded}) == expected == digest({**tensors, "b": tensors["b"].t().contiguous().t()})
    for name in ("a", "b", "one"):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1).view(torch.uint8)[-1] ^= 1
        assert digest(changed) != expected
    assert digest({**tensors, "b": tensors["b"].view(41, 50)}) != expected
    assert digest({**tensors, "c": tensors["a"]}) != expected
    assert len(digest({})) == 32

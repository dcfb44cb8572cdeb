"""The unit of privacy is a user: which examples count, what a run of each kind sums and records, and what is refused."""

import copy
import json
import re

import pytest
import torch
from asking import recorded
from small_runs import a_spec, quiet, stopped, trained, weights

from dpft.harness.engine.base import WEIGHTS
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import matched, verify_record
from dpft.harness.privacy.groups import Grouped
from dpft.harness.runs import levels, users
from dpft.harness.runs.plan import plan
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import by_user, run
from dpft.harness.train.batches import grouped, microbatches

pytestmark = pytest.mark.usefixtures("users_of_sst2")


def of(user_sampling, group_size=3, **more):
    return {"unit": "user", "user_sampling": user_sampling, "group_size": group_size, **more}


def test_the_examples_of_a_user_that_count_are_chosen_by_their_content_alone():
    owners, texts = ["a", "b", "a", "a", "c", "a", "b"], ["v", "w", "x", "y", "z", "u", "t"]
    found = users.bounded(owners, texts.__getitem__, 2)
    assert found.counts == (3, 5) and found.members[1:] == ((1, 6), (4,)) and len(found.members[0]) == 2
    turned = users.bounded(owners[::-1], texts[::-1].__getitem__, 2)
    assert {texts[row] for row in found.rows} == {texts[::-1][row] for row in turned.rows}
    more = users.bounded([*owners, "d"], [*texts, "s"].__getitem__, 2)
    assert more.members[:3] == found.members, "other users change nothing"
    assert users.bounded(owners, texts.__getitem__, 9).rows == list(range(7))


def test_what_is_sampled_is_examples_or_users(settings, tiny_bert):
    found = {}
    for kind, batch in (("els", 45), ("uls", 20)):
        found[kind] = plan(a_spec("dp-adam", tiny_bert, **of(kind), batch_size=batch), settings.data_dir)
        assert found[kind].num_examples == 50 * (1 + 2 + 3 + 3) and found[kind].sizes.users == 200
        assert found[kind].sampling_probability == 0.1 and found[kind].delta == 1 / 400
    assert found["els"].sampling == Grouped(3) and found["uls"].sampling.poisson
    assert found["els"].noise_multiplier > found["uls"].noise_multiplier
    once = plan(a_spec("dp-adam", tiny_bert, **of("els", 1), batch_size=20), settings.data_dir)
    assert once.sampling.poisson and once.noise_multiplier == found["uls"].noise_multiplier
    with pytest.raises(CannotRun, match="larger than the 200 users"):
        plan(a_spec("dp-adam", tiny_bert, **of("uls"), batch_size=201), settings.data_dir)
    with pytest.raises(CannotRun, match="not below 1/U = 0.005"):
        plan(a_spec("dp-adam", tiny_bert, **of("uls"), delta=0.005), settings.data_dir)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"unit": "person"}, "no unit called 'person'"),
        ({"unit": "user"}, "unit=user needs group_size"),
        ({"group_size": 2}, "are settings of unit=user"),
        (of("both"), "no user_sampling called 'both'"),
        (of("els", mechanism="laplace"), "with gaussian noise only, not with laplace"),
        (of("els", sampler="truncated"), "not by sampler truncated"),
        (of("uls", 0), "group_size"),
        (of("uls", task="cola"), "does not say whose its examples are"),
        (of("uls", task="digits"), "make users up, user_rows=8"),
        (of("uls", task="digits", user_rows=4, views=2, model="digits-vit"), "leave views out"),
    ],
)
def test_what_has_no_meaning_or_no_certificate_is_refused(more, message):
    with pytest.raises(BadInput, match=message):
        resolve({"task": "sst2", "method": "dp-adam", **more})


def test_an_example_unit_leaves_run_ids_alone():
    spec = resolve({"task": "sst2", "method": "dp-adam"})
    assert "unit" not in spec.canonical() and "group_size" not in spec.canonical()
    ids = {
        resolve({"task": "sst2", "method": "dp-adam", **more}).run_id
        for more in ({}, of("uls"), of("els"), of("uls", 2))
    }
    assert len(ids) == 4


def test_the_sum_of_a_batch_of_users(setup_of):
    """Each user's mean gradient, clipped once; in microbatches of users with as many rows, whatever else is in the batch."""
    setup = setup_of("dp-adam", **of("uls"), batch_size=20, clip_norm=0.1)
    assert [by_user.rows_of(own) for own in setup.prepared.train[:4]] == [1, 2, 3, 3]
    batches = list(microbatches(setup, range(12), 0))
    assert [batch[WEIGHTS].shape[1] for batch in batches] == [1, 2, 3] and len(batches) == 3
    assert sorted(sum(grouped(setup, range(12)), [])) == list(range(12))
    assert torch.equal(batches[2][WEIGHTS], torch.full((6, 3), 1 / 3))
    (sum_of_all, *_), _ = recorded(setup, [range(8)] * 4, watched=False)
    parts = []
    for one in range(8):
        alone = setup_of("dp-adam", **of("uls"), batch_size=20, clip_norm=0.1)
        (found, *_), _ = recorded(alone, [[one]] * 4, watched=False)
        parts.append(torch.cat([t.flatten() for t in found.clean.values()]))
        assert float(parts[-1].norm()) <= 0.1 * (1 + 1e-5)
    whole = torch.cat([t.flatten() for t in sum_of_all.clean.values()])
    assert float((whole - sum(parts)).norm()) < 1e-4 * float(whole.norm())


@pytest.fixture(scope="module")
def kept():
    return {}


def record_of(kind, kept, tiny_bert, settings):
    """A run as `dpft run` makes it, through JSON; made once."""
    if kind not in kept:
        spec = a_spec("last-layer", tiny_bert, **of(kind), batch_size={"els": 45, "uls": 20}[kind])
        kept[kind], _ = run.execute(spec, settings, quiet)
        assert kept[kind]["status"] == "done", kept[kind]["error"]
    return json.loads(json.dumps(kept[kind]))


@pytest.mark.parametrize("kind", ["els", "uls"])
def test_a_record_says_its_unit_and_verifies(kind, kept, tiny_bert, settings):
    record = record_of(kind, kept, tiny_bert, settings)
    privacy = record["privacy"]
    assert verify_record(record) == []
    assert (privacy["unit"], privacy["num_users"], privacy["group_size"]) == ("user", 200, 3)
    assert privacy["user_is"] == "whoever wrote it" and privacy["num_examples"] == 450
    assert record["provenance"]["train_examples"] == 450 and "user" in privacy["adjacency"]
    booked = [event.get("sampling") for event in privacy["ledger"]]
    assert booked == [{"kind": "grouped", "group_size": 3} if kind == "els" else None]
    assert privacy["cross_checks"]["pld"] == pytest.approx(privacy["epsilon"][1], abs=0.02)


FORGED = [
    ("els", {"unit": "example"}, "belongs to unit user"),
    ("els", {"group_size": 2}, "group_size is 2, but the spec asks for 3"),
    ("els", {"num_users": 400}, "delta is 0.0025, but 1 / \\(2 num_users\\) gives 0.00125"),
    ("els", {"sampling": "poisson"}, "sampling is 'poisson', but the spec asks for 'grouped'"),
    ("uls", {"num_users": 100}, "100 users of at most 3 examples each cannot have num_examples = 450"),
    ("uls", {"num_users": 225}, "is not expected_batch_size / num_users = 20 / 225"),
    ("uls", {"user_sampling": "els"}, "user_sampling is 'els', but the spec asks for 'uls'"),
    ("uls", {"adjacency": "zero-out, public N"}, "only 'zero-out of a user"),
]


@pytest.mark.parametrize("kind, forged, message", FORGED)
def test_what_is_forged_is_found(kind, forged, message, kept, tiny_bert, settings):
    record = record_of(kind, kept, tiny_bert, settings)
    record["privacy"] |= forged
    assert any(re.search(message, finding) for finding in verify_record(record))


def test_a_ledger_of_single_examples_is_no_ledger_of_users(kept, tiny_bert, settings):
    """Booked as Poisson-sampled examples, what the run spent looks like less."""
    record = record_of("els", kept, tiny_bert, settings)
    for event in record["privacy"]["ledger"]:
        del event["sampling"]
    found = " ".join(verify_record(record))
    assert "the ledger's batches are poisson" in found and "the ledger gives" in found


def test_rows_of_different_units_are_not_ranked_together(kept, tiny_bert, settings):
    els, uls = (record_of(kind, kept, tiny_bert, settings)["privacy"] for kind in ("els", "uls"))
    assert matched([els, uls]) is None, "two ways to sample, one promise, as many examples a step"
    other = {**copy.deepcopy(uls), "group_size": 2, "num_examples": 350}
    assert "differ in examples a step" in matched([uls, other])
    assert matched([uls, other], free=("sampling_probability",)) is None
    example = {key: value for key, value in els.items() if not key.startswith(("unit", "user", "group", "num_users"))}
    assert "differ in unit: 'user' against 'example'" in matched([els, example])
    assert "differ in num_users" in matched([uls, {**uls, "num_users": 199}])


@pytest.mark.parametrize("kind, batch", [("els", 45), ("uls", 20)])
def test_a_run_of_users_resumes_bit_for_bit(kind, batch, setup_of, tmp_path):
    settings = dict(of(kind), batch_size=batch)
    setup = setup_of("last-layer", **settings)
    made, final = trained(setup, watched=False), weights(setup)
    path = tmp_path / "run.ckpt"
    stopped(setup_of("last-layer", path, **settings))
    setup = setup_of("last-layer", path, **settings)
    again = trained(setup, watched=False)
    assert again.progress.curve == made.progress.curve and again.progress.chain == made.progress.chain
    assert all(torch.equal(value, final[name]) for name, value in weights(setup).items())


def test_what_protecting_users_costs_in_noise():
    """Figures of the design: N = 18,348, B = 256, T = 200; ELS and ULS in C / B."""
    setting = dict(task="digits", method="dp-adam", steps=200, batch_size=256, delta=1e-5)
    expected = {8.0: {4: (0.88, 1.06)}, 2.0: {4: (1.84, 1.70), 8: (3.35, 2.40)}}
    for epsilon, rows in expected.items():
        for row in levels.compared(resolve({**setting, "epsilon": epsilon}), 18348, None, tuple(rows)):
            noise = (row["els"]["noise"], row["uls"]["noise"])
            assert noise == pytest.approx(rows[row["group_size"]], rel=0.01) and row["problem"] is None
            assert row["users"] == 18348 // row["group_size"]
    assert levels.table([row])[0]["less noise"] == "ULS"

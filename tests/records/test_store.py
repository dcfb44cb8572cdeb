"""Records on disk: atomic, checked when read, merged without contradictions, claimed by one process at a time."""

import json
import subprocess
import sys

import pytest
from studies import loose

from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store, atomic, merge


def record(run_id="abc", final=0.5, seconds=1.0):
    """A committed record, with what is asked for put in."""
    path = min(loose("zeroth").glob("*.json"))
    one = json.loads(path.read_text())
    one["result"]["final"], one["cost"]["train_s"] = final, seconds
    return {**one, "run_id": run_id}


CURVE = [{"step": 1, "metric": None}, {"step": 2, "metric": 0.5}]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "runs")
    store.open_for_writing()
    return store


def test_round_trip(store):
    store.write(record(), CURVE)
    assert store.read("abc") == record() and store.read("other") is None
    assert store.curve("abc").rows() == [(1, None), (2, 0.5)]
    assert {path.name for path in store.folder.iterdir()} == {"abc.parquet", "abc.json"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("", "damaged"),
        ("[]", "no dpft record"),
        (json.dumps({**record(), "schema": 2}), "has schema 2"),
        (json.dumps({**record(), "status": "fine"}), "status must be one of those there are, not 'fine'"),
        (json.dumps({k: v for k, v in record().items() if k != "privacy"}), "lacks privacy"),
        (json.dumps(record("other")), "is of run 'other'"),
    ],
)
def test_damaged_records_are_named(store, text, message):
    store.record_path("abc").write_text(text)
    with pytest.raises(BadInput, match=message):
        store.records()


def test_nothing_is_left_of_a_failed_write(store):
    with pytest.raises(BadInput, match="result.final must be a finite number, not nan"):
        store.write(record(final=float("nan")), CURVE)
    with pytest.raises(OSError), atomic(store.folder / "x.json") as path:
        path.write_text("half")
        raise OSError(28, "No space left on device")
    assert list(store.folder.iterdir()) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="choose --results DIR"):
        Store(tmp_path / "file").open_for_writing()


def test_merge_takes_the_union_and_refuses_contradictions(tmp_path):
    a, b, c = (Store(tmp_path / name) for name in "abc")
    for store in (a, b, c):
        store.open_for_writing()
    a.write(record("one"), CURVE)
    b.write(record("one", seconds=9.0), CURVE)  # same outcome, other cost
    b.write(record("two"), CURVE)
    c.write(record("one", final=0.6), CURVE)
    target = tmp_path / "all"
    assert merge([a.folder, b.folder], target) == (2, 1)
    assert len(Store(target).records()) == 2 and Store(target).curve("two").height == 2
    with pytest.raises(BadInput, match="different outcomes"):
        merge([c.folder], target)
    assert Store(target).read("one")["result"]["final"] == 0.5


def test_a_claim_excludes_others_and_dies_with_its_process(store):
    code = (
        "import sys, time\nfrom dpft.harness.records.store import Store\n"
        "with Store(sys.argv[1]).claim('abc') as mine:\n    print(mine, flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, store.folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    with store.claim("abc") as mine:
        assert not mine
    process.kill()
    process.wait()
    with store.claim("abc", wait=True) as mine:
        assert mine

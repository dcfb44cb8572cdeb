"""Folders of several machines: joined without contradictions; a run that failed on one gives way to one that did not."""

import pytest
from record_cases import CURVE, record

from dpft.harness.errors import BadInput
from dpft.harness.records.merging import Merged, merge
from dpft.harness.records.store import Store


def test_merge_takes_the_union_and_refuses_contradictions(tmp_path):
    a, b, c = (Store(tmp_path / name) for name in "abc")
    for store in (a, b, c):
        store.open_for_writing()
    a.write(record("one"), CURVE)
    b.write(record("one", seconds=9.0), CURVE)  # same outcome, other cost
    b.write(record("two"), CURVE)
    c.write(record("one", final=0.6), CURVE)
    target = tmp_path / "all"
    assert merge([a.folder, b.folder], target) == Merged(2, 1, [])
    assert len(Store(target).records()) == 2 and Store(target).curve("two").height == 2
    with pytest.raises(BadInput, match="different outcomes"):
        merge([c.folder], target)
    assert Store(target).read("one")["result"]["final"] == 0.5


@pytest.mark.parametrize("status", ["oom", "timeout", "error"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_run_that_failed_gives_way_to_one_that_did_not(tmp_path, status, turned):
    failed, done = {**record("one"), "status": status, "result": None, "error": "why"}, record("one")
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    for store, one in zip((first, second), (done, failed) if turned else (failed, done), strict=True):
        store.open_for_writing()
        store.write(one, CURVE if one is done else CURVE[:1])
    for target in (tmp_path / "all", first.folder):  # a new folder, and one that has the failed run already
        found = merge([first.folder, second.folder], target)
        assert Store(target).read("one") == done and Store(target).curve("one").height == 2
        assert any(status in note and "done" in note for note in found.notes)


def test_of_two_failures_the_first_is_kept(tmp_path):
    stores = [Store(tmp_path / name) for name in ("first", "second")]
    for store, status in zip(stores, ("oom", "timeout"), strict=True):
        store.open_for_writing()
        store.write({**record("one"), "status": status, "result": None, "error": status}, [])
    assert merge([store.folder for store in stores], tmp_path / "all").copied == 1
    assert Store(tmp_path / "all").read("one")["status"] == "oom"

"""Records on disk: atomic, checked when read, claimed by one process at a time."""

import json
import subprocess
import sys

import pytest
from record_cases import CURVE, record

from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store, atomic


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
        (json.dumps({**record(), "schema": 3}), "has schema 3"),
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


def test_a_library_may_replace_what_it_writes(store):
    """safetensors writes beside the path that it is given and renames: neither file is anyone's to sweep meanwhile."""
    with atomic(store.folder / "x.ckpt") as path:
        (path.parent / ".tmpOfALibrary").write_text("whole")
        store.sweep()
        (path.parent / ".tmpOfALibrary").replace(path)
        store.sweep()
    assert [one.name for one in store.folder.iterdir()] == ["x.ckpt"] and (
        store.folder / "x.ckpt"
    ).read_text() == "whole"


@pytest.mark.parametrize("error", [OSError(28, "Detail: 28"), OSError("No space left on device (os error 28)")])
def test_a_full_disk_is_told_with_the_file_that_it_had_no_room_for(tmp_path, error):
    with pytest.raises(OSError, match="No space left on device") as seen, atomic(tmp_path / "a.json"):
        raise error
    assert seen.value.filename == str(tmp_path / "a.json") and list(tmp_path.iterdir()) == []


def test_a_summary_is_read_once_and_again_where_the_record_was_replaced(tmp_path, monkeypatch):
    store, one = Store(tmp_path), record("0" * 16)
    store.open_for_writing()
    store.write(one, CURVE)
    first = store.summary("0" * 16)
    assert first["result"] == one["result"] and "alignment_by_parameter" not in first["diagnostics"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "text", None)
        assert store.summary("0" * 16) is first
    store.write({**one, "result": {**one["result"], "final": 0.75}}, CURVE)
    assert store.summary("0" * 16)["result"]["final"] == 0.75
    store.record_path("0" * 16).unlink()
    assert store.summary("0" * 16) is None


def test_curves_read_ahead_are_those_read_one_by_one(tmp_path):
    store = Store(tmp_path)
    store.open_for_writing()
    for i in range(5):
        run_id = f"{i:016x}"
        store.write(record(run_id), [{**row, **({"loss": 0.5} if i % 2 else {})} for row in CURVE])
    store.curve_path("0" * 16).write_bytes(b"no parquet")
    ids, seen = store.ids(), []
    for run_id in store.ahead.each(ids):
        frame = store.ahead.take(run_id)
        seen.append(run_id)
        assert (frame is None) == (run_id == "0" * 16), "damaged ones are left to `curve`, which names them"
        assert frame is None or frame.equals(Store(tmp_path).curve(run_id))
    assert seen == ids

"""Packed studies: the same records and curves in two files, read by everything that reads loose ones."""

import json
import shutil
import weakref

import polars
import pytest
from studies import ROOT, STUDIES, loose

from dpft.harness.errors import BadInput
from dpft.harness.records.merging import Merged, merge
from dpft.harness.records.packed import CURVES, RECORDS, SCHEMA
from dpft.harness.records.packing import BLOCK, pack
from dpft.harness.records.store import Store
from dpft.harness.report import reading


@pytest.fixture
def copies(tmp_path):
    """A loose folder of real runs, and the same packed."""
    one, two = tmp_path / "loose", tmp_path / "packed"
    shutil.copytree(loose("official"), one)
    shutil.copytree(loose("official"), two)
    pack(two)
    return Store(one), Store(two)


def test_a_packed_folder_reads_like_the_loose_one(copies):
    one, two = copies
    assert {path.name for path in two.folder.iterdir()} == {RECORDS, CURVES}
    assert two.ids() == one.ids() and two.records() == one.records()
    assert reading.summaries(two) == reading.summaries(one)
    for record in one.records():
        run_id = record["run_id"]
        assert two.text(run_id) == one.text(run_id)
        assert two.curve(run_id).rows(named=True) == one.curve(run_id).rows(named=True)
        assert reading.diagnostics(two, record) == reading.diagnostics(one, record)
    seen = [reading.Curves(store, one.records())._evaluations for store in copies]
    assert seen[0] == seen[1]


def test_what_is_loose_counts_before_what_is_packed(copies):
    _, store = copies
    run_id = store.ids()[0]
    record = {**store.read(run_id), "status": "error", "result": None, "error": "It broke."}
    store.write(record, [])
    assert store.read(run_id)["status"] == "error"
    assert not store.has_curve(run_id), "the packed curve is of the run that was replaced"
    runs, _, _ = pack(store.folder)
    assert runs == len(store.ids()) and store.read(run_id)["status"] == "error" and not store.has_curve(run_id)


def test_a_folder_that_is_packed_while_it_is_read(copies):
    store, _ = copies
    before = store.records()
    pack(store.folder)
    assert store.records() == before and store.read(before[0]["run_id"]) == before[0]


def test_runs_that_failed_have_no_curve_and_other_columns_are_kept(tmp_path):
    store = Store(tmp_path)
    shutil.copytree(loose("official"), tmp_path, dirs_exist_ok=True)
    one, two, three = store.ids()[:3]
    store.curve_path(one).unlink()
    store.curve(two).with_columns(extra=polars.lit("x")).write_parquet(store.curve_path(two))
    store.curve(three).drop("loss").write_parquet(store.curve_path(three))
    rows = {run_id: store.curve(run_id).rows(named=True) for run_id in (two, three)}
    pack(tmp_path)
    assert not store.has_curve(one)
    assert {run_id: store.curve(run_id).rows(named=True) for run_id in rows} == rows


def test_a_folder_without_any_curve(tmp_path):
    shutil.copy(loose("official") / f"{Store(loose('official')).ids()[0]}.json", tmp_path)
    pack(tmp_path)
    assert len(Store(tmp_path).records()) == 1 and not Store(tmp_path).has_curve(Store(tmp_path).ids()[0])


def test_many_blocks_and_ids_that_are_not_there(tmp_path):
    names = [f"{i:016x}" for i in range(0, 3 * BLOCK, 1)]
    (record,) = Store(loose("official")).records()[:1]
    for i, name in enumerate(names):
        (tmp_path / f"{name}.json").write_text(json.dumps({**record, "run_id": name}))
        if i % 3:
            polars.DataFrame({"step": [1, 2], "metric": [None, float(i)]}).write_parquet(tmp_path / f"{name}.parquet")
    pack(tmp_path)
    store = Store(tmp_path)
    assert store.ids() == names
    for i in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 2, 3 * BLOCK - 1):
        assert store.read(names[i])["run_id"] == names[i] and store.has_curve(names[i]) == bool(i % 3)
        assert not i % 3 or store.curve(names[i]).rows() == [(1, None), (2, float(i))]
    for missing in ("", "0", f"{BLOCK:016x}0", "f" * 16):
        assert store.read(missing) is None and not store.has_curve(missing)
    records = [{"run_id": name} for i, name in enumerate(names) if i % 3]
    assert all(reading.Curves(store, records).of(one)["metric"] for one in records)


def test_packing_holds_a_few_blocks_of_curves_however_many_there_are(tmp_path, monkeypatch):
    """50,000 runs took 6 GB."""
    (record,) = Store(loose("official")).records()[:1]
    for i in range(6 * BLOCK):
        (tmp_path / f"{i:016x}.json").write_text(json.dumps({**record, "run_id": f"{i:016x}"}))
        polars.DataFrame({"step": [1], "metric": [float(i)]}).write_parquet(tmp_path / f"{i:016x}.parquet")
    held, alive, curve = [], [], Store.curve

    def watched(*arguments, **more):
        found = curve(*arguments, **more)
        held.append(weakref.ref(found))
        alive.append(sum(one() is not None for one in held))
        return found

    monkeypatch.setattr(Store, "curve", watched)
    pack(tmp_path)
    assert len(held) >= 6 * BLOCK and max(alive) <= 2 * BLOCK


def test_nothing_is_removed_where_packing_fails(tmp_path, monkeypatch):
    shutil.copytree(loose("official"), tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    store = Store(tmp_path)
    first, run_id = store.ids()[:2]
    for one, extra in ((first, "x"), (run_id, 7)):
        store.curve(one).with_columns(extra=polars.lit(extra)).write_parquet(store.curve_path(one))
    with pytest.raises(BadInput, match="cannot be packed"):
        pack(tmp_path)
    store.record_path(run_id).write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        pack(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before.keys()


@pytest.mark.parametrize("name", [RECORDS, CURVES])
def test_damaged_and_newer_files_are_named(copies, name):
    _, store = copies
    path, run_id = store.folder / name, store.ids()[0]
    whole = path.read_bytes()
    for bad in (b"", b"PAR1", whole[: len(whole) // 2], whole[:4] + bytes(len(whole) - 8) + whole[-4:]):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match=name):
            Store(store.folder).read(run_id), Store(store.folder).curve(run_id)
    polars.DataFrame({"run_id": ["a"]}).write_parquet(path)
    with pytest.raises(BadInput, match="is no packed study of dpft"):
        Store(store.folder).read(run_id), Store(store.folder).curve(run_id)
    import pyarrow.parquet

    table = polars.DataFrame({"run_id": ["a"]}).to_arrow().replace_schema_metadata({"dpft": str(SCHEMA + 1)})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(BadInput, match=f"schema {SCHEMA + 1}, not {SCHEMA}"):
        Store(store.folder).read(run_id), Store(store.folder).curve(run_id)


@pytest.mark.parametrize(
    "column, table", [("run_id", RECORDS), ("record", RECORDS), ("columns", RECORDS), ("step", CURVES)]
)
def test_a_column_of_another_type_is_named(copies, dpft, column, table):
    """A number as id went through `verify` as a fault of dpft."""
    import pyarrow.parquet

    packed = copies[1].folder
    path = packed / table
    old = pyarrow.parquet.read_table(path)
    other = old.set_column(old.column_names.index(column), column, pyarrow.array([0.5] * len(old)))
    pyarrow.parquet.write_table(other.replace_schema_metadata(old.schema.metadata), path)
    code, _, err = dpft(*(("report", packed, "--curves") if table == CURVES else ("verify", packed)))
    assert code == 2 and err.count("\n") == 1 and f"its column {column} is of type double" in err


def test_merge_unpacks(copies, tmp_path):
    one, two = copies
    assert merge([two.folder], tmp_path / "again") == Merged(len(one.ids()))
    assert merge([one.folder], tmp_path / "again") == Merged(0, len(one.ids()))
    assert Store(tmp_path / "again").records() == one.records()


def test_committed_studies_are_packed():
    found = {path.name for study in STUDIES for path in (ROOT / "results" / study).iterdir()}
    assert found == {RECORDS, CURVES, "README.md"}

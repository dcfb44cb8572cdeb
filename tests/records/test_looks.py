"""What was looked at by parameter lies beside the curve: whole again when it is read, seen by verify, in old records, too."""

import json

import polars
import pytest
from small_runs import a_spec, quiet
from studies import loose

from dpft.harness.errors import BadInput
from dpft.harness.records import looks
from dpft.harness.records.merging import merge
from dpft.harness.records.packing import pack
from dpft.harness.records.store import Store
from dpft.harness.records.verifying import verify_folder
from dpft.harness.report import reading
from dpft.harness.train import run
from dpft.harness.train.settings import Settings

HOW = {
    "rmt": {"scope": "body"},  # alignments, what the decoder saw, spectra
    "dp-lora": {},  # alignments alone
    "dp-zo": {},  # no gradient is asked for: its update is held against one
    "non-private": {},  # nothing
}


@pytest.fixture(scope="module")
def made(tiny_bert, mirror, tmp_path_factory):
    """(store, method -> record and curve as the run gave them)."""
    store, found = Store(tmp_path_factory.mktemp("runs")), {}
    store.open_for_writing()
    for method, more in HOW.items():
        found[method] = run.execute(a_spec(method, tiny_bert, **more), Settings(data_dir=mirror), quiet)
        store.write(*found[method])
    return store, found


@pytest.mark.parametrize("way", ["loose", "packed", "merged", "merged from packed"])
def test_a_record_is_whole_again(made, way, tmp_path):
    store, found = made
    if way != "loose":
        merge([store.folder], tmp_path / "one")
        store = Store(tmp_path / "one")
    if "packed" in way:
        pack(store.folder)
    if way == "merged from packed":
        merge([store.folder], tmp_path / "two")
        store = Store(tmp_path / "two")
    for record, curve in found.values():
        kept = store.read(record["run_id"])
        assert record["schema"] == kept["schema"] == 2
        assert not set(looks.KINDS) & set(kept["diagnostics"])
        assert store.whole(kept) == store.whole(store.summary(record["run_id"])) | {
            "diagnostics": record["diagnostics"]
        }
        assert (
            reading.diagnostics(store, store.summary(record["run_id"]))["spectra"] == record["diagnostics"]["spectra"]
        )
        assert store.curve(record["run_id"]).rows(named=True) == curve, "and its curve is what it was"
    assert all(not one.findings for one in verify_folder(store.folder).values())


def test_what_is_looked_at_is_json_by_step_that_others_can_read(made):
    store, found = made
    record, _ = found["rmt"]
    rows = polars.read_parquet(store.curve_path(record["run_id"])).drop_nulls(looks.COLUMN)
    texts = dict(rows.select("step", looks.COLUMN).iter_rows())
    seen = [{"step": step, **json.loads(text)["alignment_by_parameter"]} for step, text in texts.items()]
    assert seen == record["diagnostics"]["alignment_by_parameter"] and seen


def test_a_record_is_a_page(made):
    store, found = made
    for record, _ in found.values():
        text = store.record_path(record["run_id"]).read_text()
        assert len(text) < 8_000 and len(text) < len(json.dumps(record, indent=1)) + 1


def spoilt(frame, what):
    column = frame[looks.COLUMN]
    return {
        "another step": lambda: frame.with_columns(column.shift(-1).alias(looks.COLUMN)),
        "nothing": lambda: frame.drop(looks.COLUMN),
        "numbers": lambda: frame.with_columns(polars.lit(3).alias(looks.COLUMN)),
        "other JSON": lambda: frame.with_columns(polars.lit("[3]").alias(looks.COLUMN)),
        "other entries": lambda: frame.with_columns(polars.lit('{"a": {}}').alias(looks.COLUMN)),
        "no JSON": lambda: frame.with_columns(polars.lit("{").alias(looks.COLUMN)),
    }[what]()


@pytest.mark.parametrize("what", ["another step", "nothing", "numbers", "other JSON", "other entries", "no JSON"])
def test_verify_sees_what_lies_beside_the_curve(made, what, tmp_path):
    store, found = made
    merge([store.folder], tmp_path / "runs")
    run_id = found["rmt"][0]["run_id"]
    path = Store(tmp_path / "runs").curve_path(run_id)
    spoilt(polars.read_parquet(path), what).write_parquet(path)
    verdicts = verify_folder(tmp_path / "runs")
    said = verdicts.pop(run_id).findings
    assert len(said) == 1 and ("look into steps" in said[0] or looks.COLUMN in said[0]), said
    assert all(not one.findings for one in verdicts.values())
    if "look into" not in said[0]:
        with pytest.raises(BadInput, match="run it again"):
            Store(tmp_path / "runs").looks(run_id)


def test_noise_in_spectra_that_is_not_the_ledgers_is_found(made, tmp_path):
    store, found = made
    record, curve = found["rmt"]
    forged = json.loads(json.dumps(record))
    next(iter(forged["diagnostics"]["spectra"][0]["matrices"].values()))["noise_std"] *= 2
    other = Store(tmp_path)
    other.write(forged, curve)
    (verdict,) = verify_folder(tmp_path).values()
    assert any("sigma C / B" in one for one in verdict.findings)


def test_records_of_schema_1_hold_all_in_themselves(tmp_path):
    store = Store(loose("theory"))
    record = next(one for one in store.each() if one["spec"]["decoder"] == "rmt")
    assert record["schema"] == 1 and record["diagnostics"]["spectra"]
    assert store.whole(record) == record == store.whole(store.summary(record["run_id"]))
    merge([store.folder], tmp_path / "runs")
    assert Store(tmp_path / "runs").text(record["run_id"]) == store.text(record["run_id"]), "nothing is written anew"


def test_a_record_that_says_that_it_is_of_schema_2_has_nothing_in_itself(tmp_path):
    old = Store(loose("theory"))
    run_id = next(one["run_id"] for one in old.each() if one["spec"]["decoder"] == "rmt")
    merge([old.folder], tmp_path / "runs")
    path = Store(tmp_path / "runs").record_path(run_id)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    assert any("look into steps []" in one for one in verify_folder(tmp_path / "runs")[run_id].findings)

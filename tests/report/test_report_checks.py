"""Nothing that `dpft verify` rejects is ranked, and nothing that was made from other data, weights or noise."""

import copy
import time

import pytest
from report_cases import ROOT, changed, lines, ranks, records, shorter, store_of, text_of

from dpft.harness import report
from dpft.harness.records.store import Store
from dpft.harness.report import View, rejections, rows, tables, views
from dpft.harness.report.reading import Curves
from dpft.harness.runs.spec import completed


@pytest.fixture(autouse=True)
def _own_cache(own_cache):
    """What was verified before must not decide a test."""


def three():
    """One table: rmt before dp-adam before rmt-momentum."""
    chosen = records(task="sentences", lr=1e-4, seed=0)
    return [r for r in chosen if r["spec"]["method"] in ("dp-adam", "rmt", "rmt-momentum")]


def over_budget(record):
    record["privacy"]["within_budget"] = False


def empty_ledger(record):
    record["privacy"]["ledger"] = []


def no_noise(record):
    record["privacy"]["noise_multiplier"] = 0


def no_noise_in_the_ledger(record):
    record["privacy"]["ledger"][0]["noise_multiplier"] = 0.0


def half_the_noise(record):
    record["privacy"]["noise_multiplier"] /= 2
    (event,) = record["privacy"]["ledger"]
    event["noise_multiplier"] /= 2
    event["releases"][0]["noise_multiplier"] /= 2


def fewer_steps_booked(record):
    record["privacy"]["ledger"][0]["step_to"] = 8


def another_rate(record):
    record["spec"]["lr"] = 5.0


def no_privacy(record):
    record["privacy"] = None


TAMPERED = [
    over_budget,
    empty_ledger,
    no_noise,
    no_noise_in_the_ledger,
    half_the_noise,
    fewer_steps_booked,
    another_rate,
    no_privacy,
]


@pytest.mark.parametrize("spoil", TAMPERED)
def test_what_does_not_verify_is_shown_without_a_rank(tmp_path, spoil):
    chosen = three()
    spoilt = next(r for r in chosen if r["spec"]["method"] == "rmt")
    spoil(spoilt)
    text = text_of(tmp_path, chosen)
    assert ranks(text) == {"dp-adam": "1", "rmt-momentum": "2", "rmt": ""}
    assert f"**Without a rank**: rmt: run {spoilt['run_id']} does not verify: " in text
    store = Store(tmp_path)
    assert report.markdown(report.summaries(store), store) == text, "the second time from the cache"


def test_findings_are_kept_until_the_record_changes(tmp_path):
    store = Store(ROOT / "results/noise")
    chosen = [r for r in report.summaries(store) if r["spec"]["mechanism"] == "plrv"]
    start = time.perf_counter()
    assert rejections.rejected(chosen) == {}
    first, start = time.perf_counter() - start, time.perf_counter()
    assert rejections.rejected(chosen) == {}
    assert time.perf_counter() - start < first / 5
    worse = [copy.deepcopy(one) for one in chosen]  # equal sections of summaries are one object
    worse[0]["privacy"]["epsilon"][2] += 0.1
    assert list(rejections.rejected(worse)) == [worse[0]["run_id"]]


def test_rows_of_other_data_or_weights_are_not_ranked(tmp_path):
    for key, what in (("data_fingerprint", "data"), ("model_fingerprint", "pretrained weights")):
        chosen = three()
        next(r for r in chosen if r["spec"]["method"] == "rmt")["provenance"][key] = "0" * 64
        text = text_of(tmp_path / key, chosen)
        assert set(ranks(text).values()) == {""} and f"differ in their {what}: " in text and "000000000000" in text
        assert "Paired differences" not in text and "Pareto" not in text


def test_unknown_fingerprints_and_several_versions_of_torch_are_said(tmp_path):
    chosen = three()
    for record in chosen:
        if record["spec"]["method"] == "rmt":
            record["provenance"]["data_fingerprint"] = None
            record["provenance"]["versions"]["torch"] = "2.14.0"
    text = text_of(tmp_path, chosen)
    assert sorted(ranks(text).values()) == ["1", "2", "3"]
    assert "Fingerprint of the data unknown, so not compared: rmt." in text
    assert "2.13.0+cpu: dp-adam, rmt-momentum; 2.14.0: rmt." in text
    quiet = text_of(tmp_path / "quiet", three())
    assert "Fingerprint" not in quiet and "versions of torch" not in quiet


def test_a_control_on_other_data_is_named(tmp_path):
    chosen = records("official", task="sentences")
    next(r for r in chosen if r["spec"]["method"] == "non-private")["provenance"]["data_fingerprint"] = "0" * 64
    text = text_of(tmp_path, chosen)
    assert "Not on the data of the other rows: non-private." in text and ranks(text)["dp-adam"] == "3"


def test_streams_of_noise_have_tables_of_their_own():
    old = [{**r, "spec": completed(r["spec"])} for r in three()]
    new = [{**r, "run_id": r["run_id"][::-1], "spec": {**r["spec"], "noise_stream": 2}} for r in old]
    old = [
        {**r, "spec": {**r["spec"], "noise_stream": 1}} if i else r for i, r in enumerate(old)
    ]  # as old files lack it
    found = rows.groups(old + new)
    assert [{row.spec.get("noise_stream", 1) for row in group} for group in found] == [{1}, {2}]
    mixed = rows.ordered([*found[0], *found[1]])
    placed, reason = rows.places(mixed)
    assert set(placed) == {None} and "differ in their noise stream: " in reason


def test_samplers_have_tables_of_their_own_and_say_what_they_are(tmp_path):
    """As they would be written; the same numbers, so that nothing but the sampler keeps them apart."""
    poisson, cut = three(), []
    for record in three():
        new = changed(record, sampler="truncated")
        drawn = {"kind": "truncated", "num_examples": new["privacy"]["num_examples"], "truncated_batch_size": 337}
        new["privacy"] |= {
            "sampling": "truncated",
            "ledger": [{**e, "sampling": drawn} for e in new["privacy"]["ledger"]],
        }
        cut.append(new)
    every = [{**r, "spec": completed(r["spec"])} for r in [*poisson, *cut]]
    found = views.arrange(every, View(), Curves(Store(tmp_path), every))
    private = [group for group in found if group.private]
    assert [group.sampler for group in private] == ["poisson", "truncated"]
    assert len({group.title for group in private}) == len({group.stem for group in private}) == 2
    assert all(set(filter(None, group.ranks)) for group in private), "neither unranks the other"
    mixed = rows.ordered([*private[0].rows, *private[1].rows])
    placed, reason = rows.places(mixed)
    assert set(placed) == {None} and "differ in sampling: " in reason
    text = text_of(tmp_path / "text", poisson)
    assert "; Poisson sampling, B = " in text
    said = tables.budget([row.records[0]["privacy"] for row in private[1].rows], False)
    assert "; Poisson sampling cut at 337 examples, B = " in said


def test_budgets_that_differ_are_matched_with_steps_free_only(tmp_path):
    chosen = [shorter(r, 8) if r["spec"]["method"] == "dp-adam" else r for r in three()]
    text = text_of(tmp_path, chosen)
    assert set(ranks(text).values()) == {""} and "differ in steps_planned" in text
    assert sorted(ranks(text_of(tmp_path / "free", chosen, view=View("budget"))).values()) == ["1", "2", "3"]


def test_the_csv_says_what_does_not_verify(tmp_path):
    chosen = three()
    over_budget(chosen[0])
    store = store_of(tmp_path / "runs", chosen)
    made = report.Report(report.summaries(store), store, report.Options())
    made.csv(tmp_path / "runs.csv")
    import csv

    found = {line["run_id"]: line["verified"] for line in csv.DictReader((tmp_path / "runs.csv").open())}
    assert [found[r["run_id"]] for r in chosen] == ["no", "yes", "yes"]


def test_a_bad_row_is_not_the_best_rate_of_its_method(tmp_path):
    chosen = records(task="sst2", method="dp-grape", seed=0) + records(task="sst2", method="dp-adam", lr=0.002, seed=0)
    for i, record in enumerate(chosen):
        if record["spec"]["method"] == "dp-grape" and record["spec"]["lr"] == 0.0005:
            chosen[i] = changed(record, final=0.99)
            over_budget(chosen[i])
    text = text_of(tmp_path, chosen)
    (name,) = (line["method"] for line in lines(text) if line["#"] and "grape" in line["method"])
    assert name in ("dp-grape (lr=0.001)", "dp-grape (lr=0.002)")

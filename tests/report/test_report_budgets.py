"""Runs that release several things a step: the report and the page name them; other reports stay as they are."""

import json
import shutil
import subprocess
from importlib.resources import files

import polars
import pytest
import report_cases
import shared_budget_cases as cases
from forged_cases import SST2
from studies import ROOT

from dpft.harness import report
from dpft.harness.records.store import Store
from dpft.harness.report import budgets, page
from dpft.harness.report.page.data import Builder

NODE = shutil.which("node")


@pytest.fixture(scope="module", autouse=True)
def several(tmp_path_factory):
    cases.register(tmp_path_factory.mktemp("plugin"))
    yield
    cases.unregister()


@pytest.fixture(scope="module")
def chosen():
    """The record with several releases a step, and the committed one that it was made from."""
    (plain,) = (r for r in report_cases.records("official") if f"official/{r['run_id']}" == SST2)
    record, rows = cases.shared_record()
    record |= {"diagnostics": plain["diagnostics"], "source": plain["source"]}
    record["curve"] = polars.DataFrame(rows, infer_schema_length=None)
    return record, plain


def test_a_table_says_what_its_runs_release(chosen, tmp_path):
    text = report_cases.text_of(tmp_path / "both", chosen)
    (line,) = (part for part in text.split("\n\n") if part.startswith("Releases of a step"))
    assert line == (
        "Releases of a step, each with its part of the budget: several-questions: 5 steps: vote 50%, gradient 50%; "
        "31 steps: gradient 99%, count 1%; 4 steps: gradient."
    )
    assert "Not ranked" not in text and report_cases.ranks(text, 1)["several-questions"] == "1"
    assert "Releases of a step" not in report_cases.text_of(tmp_path / "plain", chosen[1:])


def test_a_public_page_holds_the_ledger_with_every_name(chosen, tmp_path):
    store = report_cases.store_of(tmp_path / "runs", chosen)
    (run,) = (
        Builder(store, report.Options(public=True)).prepare(r).shown
        for r in store.records()
        if r["spec"]["method"] == cases.NAME
    )
    assert {release["name"] for event in run["privacy"]["ledger"] for release in event["releases"]} == {
        "vote",
        "gradient",
        "count",
    }
    page.write(tmp_path / "page.html", store, store.records(), public=True)


@pytest.mark.skipif(NODE is None, reason="needs node on the PATH")
def test_the_page_names_releases_with_their_shares(chosen):
    """The page's own functions, on the ledgers of both records and on a long one."""
    folder = files(page)
    script = "".join((folder / name).read_text(encoding="utf-8") for name in ("data.js", "details.js"))
    ledgers = [record["privacy"]["ledger"] for record in chosen]
    votes = {**ledgers[0][1], "step_from": 0, "step_to": 1}
    long = [{**(votes if i % 2 else ledgers[1][0]), "step_from": i, "step_to": i + 1} for i in range(3000)]
    script += (
        f"\nconsole.log(JSON.stringify({json.dumps([*ledgers, long])}.map((ledger) => "
        "kindsOf(ledger).map(([steps, event]) => [steps, released(event)]))));"
    )
    done = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared, plain, many = json.loads(done.stdout)
    assert plain == [["0–40", "gradient (sensitivity × 1)"]]
    steps, text = shared[1]
    assert len(shared) == 9 and steps == "5–9"
    assert text.startswith("gradient (99% of the budget, noise multiplier 0.7") and "count (1% of the budget" in text
    assert shared[2][1] == "gradient (sensitivity × 1)"
    assert [steps for steps, _ in many] == ["1,500 steps", "1,500 steps"] and "count" in many[1][1]


def test_no_line_for_committed_records(monkeypatch):
    from dpft.harness import report
    from dpft.harness.report import reading, rejections

    # a rejected record has no line anyway, and to certify them all again takes half a minute
    monkeypatch.setattr(rejections, "rejected", lambda records: {})
    for folder in ("official", "noise"):
        store = Store(ROOT / "results" / folder)
        for group in report.Report(reading.summaries(store), store, report.Options()).groups:
            assert budgets.line(group.rows, group.names) is None

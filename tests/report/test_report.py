"""Reports of many records: verdicts, views, LaTeX, CSV, what is public, and that reading scales."""

import csv
import json
import math
import re
import tempfile
import time
from pathlib import Path

import many_runs
import pytest
import report_cases
from studies import loose

from dpft.harness import report
from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store
from dpft.harness.report import reading
from dpft.harness.report.text import markdown

ROOT = Path(__file__).parents[2]
FULL = loose("full")
KEPT = tempfile.TemporaryDirectory()  # as long as this module
SPECTRAL = Path(KEPT.name)  # of FULL: four methods at one learning rate, three seeds each
for path in FULL.glob("*.json"):
    spec = json.loads(path.read_text())["spec"]
    if (spec["task"], spec["lr"]) == ("sentences", 1e-4) and spec["method"] != "dp-grape":
        for file in (path, path.with_suffix(".parquet")):
            (SPECTRAL / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A thousand clones of real records: two tasks, ten methods, five rates, ten seeds."""
    folder = tmp_path_factory.mktemp("many")
    many_runs.make(SPECTRAL, folder, 1000)
    return Store(folder)


def parts(store, records=None, **options):
    made = report.Report(reading.summaries(store) if records is None else records, store, report.Options(**options))
    return made, markdown(list(made.parts()))


def test_summaries_are_the_records_without_their_bulk():
    store = Store(SPECTRAL)
    for whole, slim in zip(store.records(), reading.summaries(store), strict=True):
        kept = {key: whole["diagnostics"][key] for key in ("private", "alignment", "clipped_fraction")}
        assert slim == {**whole, "diagnostics": kept}
        assert reading.diagnostics(store, slim) == whole["diagnostics"]


def test_curves_are_read_as_one_by_one():
    for name in ("official", "full"):
        store = Store(ROOT / "results" / name)
        records = [r for r in store.records() if r["status"] == "done"]
        curves = reading.Curves(store, records)
        for record in records:
            slow = store.curve(record["run_id"]).drop_nulls("metric")
            assert curves.of(record) == {key: slow[key].to_list() for key in reading.COLUMNS}


def test_a_missing_curve_and_a_damaged_record_are_named(many, tmp_path):
    many_runs.make(SPECTRAL, tmp_path, 3)
    curve, path = sorted(tmp_path.glob("*.parquet"))[0], sorted(tmp_path.glob("*.json"))[1]
    curve.unlink()
    with pytest.raises(BadInput, match=curve.stem):
        parts(Store(tmp_path))
    for bad in (path.read_text()[:5000], "[]", '{"schema": 9}', '{"diagnostics": 3}', ""):
        path.write_text(bad)
        with pytest.raises(BadInput, match=path.stem):
            reading.summaries(Store(tmp_path))


def test_verdicts_find_the_gains_that_are_there_and_no_others(many):
    made, text = parts(many)
    assert len(made.groups) == 2 and text.count("Paired differences in") == 2
    for group in made.groups:
        means = {row.method: row.final for row in sorted(group.rows, key=lambda row: row.final)}
        del means["dp-adam"]
        base = max(row.final for row in group.rows if row.method == "dp-adam")
        assert max(means.values()) > base + 0.05, "there is something to find"
        for method, mean in means.items():
            (line,) = [
                x
                for x in text.split(f"### {group.title}")[1].split("###")[0].splitlines()
                if re.match(rf"\| +{method} \(.*\+?-?0\.\d+ to", x)
            ]
            assert float(line.split("|")[3]) == pytest.approx(mean - base, abs=6e-5)
            if abs(mean - base) > 0.05:  # five standard deviations of a seed
                assert line.rstrip(" |").endswith("better" if mean > base else "worse")
    three = [r for r in reading.summaries(many) if r["spec"]["seed"] < 3]
    _, text = parts(many, three)
    assert "cannot tell with 3 seeds: smallest p is 0.25" in text and "better |" not in text
    one = [r for r in three if r["spec"]["seed"] == 0]
    assert "Paired differences" not in parts(many, one)[1]


def test_all_settings_together_on_one_scale(many, tmp_path):
    made = report.Report(reading.summaries(many), many, report.Options())
    text = markdown(list(made.parts(report.Figures(tmp_path, "pictures"))))
    (table,) = re.findall(r"### All 2 ranked settings together\n\n(.*?)\n\n", text, re.S)
    lines = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert len(lines) == 10 and list(lines) == sorted(lines, key=lambda name: -float(lines[name][0]))
    scores = []
    for group in made.groups:
        base = max(row.final for row in group.rows if row.method in ("dp-adam", "dp-sgd"))
        (row,) = (row for row in group.rows if row.method == "dp-muon")
        chance = group.result["chance"]
        scores += [(value - chance) / (base - chance) for value in row.finals.values()]
    middle = sorted(scores)[len(scores) // 4 : -(len(scores) // 4)]  # 20 runs: without the five lowest and highest
    assert float(lines["dp-muon"][0]) == pytest.approx(sum(middle) / len(middle), abs=6e-4)
    low, high = map(float, lines["dp-muon"][1].split(" to "))
    assert low < float(lines["dp-muon"][0]) < high and high - low < 0.2
    assert "(pictures/profiles.svg)" in text and "share of runs above" in (tmp_path / "profiles.svg").read_text()
    cell = (
        f"{next(row for row in made.groups[0].every if row.method == 'dp-muon' and row.spec['lr'] == 4e-4).final:.3f}"
    )
    assert f">{cell}</text>" in (tmp_path / f"{made.groups[0].stem}-lr.svg").read_text(), (
        "the map has every rate's mean"
    )
    one_task = [r for r in reading.summaries(many) if r["spec"]["task"] == "task-0"]
    assert "settings together" not in parts(many, one_task)[1]


def test_the_baseline_can_be_named(many):
    assert "to `dp-lora" in parts(many, baseline="dp-lora")[1]
    with pytest.raises(BadInput, match="did you mean 'dp-lora'"):
        parts(many, baseline="dp-lroa")


def test_views_hold_equal_what_they_say(tmp_path):
    chosen = [r for r in report_cases.records(task="sentences", lr=1e-4) if r["spec"]["method"] != "dp-grape"]
    # dp-adam took half as many steps on this budget
    chosen = [report_cases.shorter(r, 8) if r["spec"]["method"] == "dp-adam" else r for r in chosen]
    store = report_cases.store_of(tmp_path, chosen)
    records = reading.summaries(store)
    made, text = parts(store, records)
    assert "**Not ranked**" in text and "steps_planned" in text and "Paired differences" not in text
    made, text = parts(store, records, view=report.View("budget"))
    assert "Matched: the privacy budget" in text and "Paired differences" in text and made.groups[0].reason is None
    made, text = parts(store, records, view=report.View("compute"))
    assert "2,048 example-gradients" in text and "| 8 (" in re.sub(r"\s+", " ", text)
    for row in made.groups[0].rows:
        for record in row.records:
            curve = store.curve(record["run_id"]).filter(store.curve(record["run_id"])["step"] == 8)
            assert record["result"]["final"] == curve["metric"][0]
    made, text = parts(store, records, view=report.View("time"))
    assert "s of steps on AMD EPYC (cpu, 1 thread)" in text
    assert parts(store, records, view=report.View("memory", 1000))[1].count("Left out") == 0
    peak = made.groups[0].rows[0].peak_bytes / 2**20
    made, text = parts(store, records, view=report.View("memory", peak / 2))
    assert not made.groups and "admits no row" in text and "rmt-momentum: " in text
    for bad in (("memory", None), ("budget", 100), ("memory", -1), ("memory", math.nan)):
        with pytest.raises(BadInput):
            report.View(*bad)


def test_public_reports_hold_no_diagnostics(many, tmp_path):
    store = Store(SPECTRAL)
    figures = report.Figures(tmp_path / "p", "p")
    made = report.Report(reading.summaries(store), store, report.Options(public=True))
    text = markdown(list(made.parts(figures)))
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert "alignment" not in table and "spikes" not in table and "decoded" not in table and "alignment" not in text
    assert not [p.name for p in figures.folder.iterdir() if "alignment" in p.name or "singular" in p.name]
    made.csv(tmp_path / "public.csv")
    assert not re.search("alignment|clipped_fraction", (tmp_path / "public.csv").read_text())


def test_csv_has_a_line_per_run_and_latex_every_table(tmp_path):
    store = Store(SPECTRAL)
    made = report.Report(reading.summaries(store), store, report.Options())
    made.csv(tmp_path / "runs.csv")
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    whole = {r["run_id"]: r for r in store.records()}
    assert {line["run_id"] for line in lines} == set(whole)
    assert all(float(line["final"]) == whole[line["run_id"]]["result"]["final"] for line in lines)
    assert {line["steps_to_threshold"] for line in lines if line["method"] == "dp-adam"} >= {"2"}
    latex = report.latex(list(made.parts()))
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 3
    assert not set("εσ±≤∞–`") & set(latex) and "rmt-momentum" in latex


def test_a_report_of_twice_as_many_runs_takes_about_twice_as_long(many):
    """Linear: a quadratic step would take four times as long (the bound leaves room for a busy machine)."""
    records = reading.summaries(many)

    def took(some):
        start = time.process_time()
        parts(many, some, rates=True)
        return time.process_time() - start

    took(records[:100])
    assert took(records) < 3.2 * took(records[:500]) + 0.5

"""Reports of one screen: six columns, short names, each value said once."""

import json
import re

import pytest
from studies import ROOT, STUDIES, loose

from dpft.harness.records.store import Store
from dpft.harness.report import Figures, Options, Report, summaries
from dpft.harness.report.brief import LINES, MOST
from dpft.harness.report.labels import labels
from dpft.harness.report.rows import Row
from dpft.harness.report.text import Table


def brief(study, pictures=None, baseline=None):
    store = Store(ROOT / "results" / study)
    return Report(summaries(store), store, Options(baseline=baseline)).brief(pictures)


@pytest.mark.parametrize("study", [study for study in STUDIES if study != "theory"])
def test_every_study_fits_a_screen(study):
    for part in brief(study):
        if isinstance(part, Table):
            assert 1 <= len(part.cells) <= LINES and len(part.cells[0]) <= MOST
            assert len({cells["method"] for cells in part.cells}) == len(part.cells)
            assert max(len(line) for line in part.markdown().splitlines()) <= 130
        else:
            assert len(part) <= 400


def test_budgets_of_a_setting_stand_side_by_side_and_pictures_are_drawn(tmp_path):
    digits, sst2 = (
        part for part in brief("sparse", Figures(tmp_path, "pictures"), "sparta") if isinstance(part, Table)
    )
    assert list(digits.cells[0]) == list(sst2.cells[0]) == ["method", "ε 1", "ε 2", "ε 4", "ε 8"]
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["digits-digits-resnet-eps8-brief.svg", "sst2-minilm-l6-eps8-brief.svg"]
    assert all(name in (tmp_path / drawn[0]).read_text() for name in ("sparta", "magnitude-rows"))


def test_values_are_those_of_the_full_tables():
    store = Store(ROOT / "results/full")
    report = Report(summaries(store), store, Options())
    full = {(g.spec["task"], n): r.final for g in report.groups for n, r in zip(g.names, g.rows, strict=True)}
    title, checked = None, 0
    for part in report.brief():
        if not isinstance(part, Table):
            title = found[1] if (found := re.match(r"\*\*(\w+),", part)) else title
            continue
        for cells in part.cells:
            near = [
                value
                for (task, name), value in full.items()
                if task == title and name.split()[0] == cells["method"].split()[0]
            ]
            assert any(f"{value:.3f}" == cells["accuracy"][:5] for value in near), cells
            checked += 1
    assert checked >= 10


def test_verdicts_that_are_all_alike_are_said_once():
    said = [part for part in brief("full") if isinstance(part, str) and "can be told from chance" in part]
    assert len(said) == 2 and all("smallest p is 0.25" in part for part in said)


def row(method, options=None, **spec):
    return Row({"method": method, "options": options or {}, "seed": 0, **spec}, [])


def test_labels_say_only_what_differs():
    noise = [
        row("last-layer", mechanism="gaussian", noise_shape="spherical"),
        row("last-layer", mechanism="laplace", noise_shape="spherical"),
        row("last-layer", mechanism="laplace", noise_shape="coordinates"),
        row("last-layer", mechanism="lmo", noise_shape="spherical"),
    ]
    assert labels(noise, ["a", "b", "c", "d"]) == ["gaussian", "laplace", "laplace, coordinates", "lmo"]
    methods = [row("dp-zo", {"directions": 16}, clip_norm=2.0), row("dp-zo", {"directions": 1}, clip_norm=2.0)]
    assert labels([*methods, row("dp-sgd")], list("abc")) == ["dp-zo (directions 16)", "dp-zo (directions 1)", "dp-sgd"]


def test_rows_that_would_be_called_the_same_keep_their_full_names():
    assert labels([row("rmt", lr=1.0), row("rmt", lr=2.0)], ["rmt (lr=1)", "rmt (lr=2)"]) == [
        "rmt (lr=1)",
        "rmt (lr=2)",
    ]


def test_one_task_of_a_folder(dpft):
    code, out, _ = dpft("report", ROOT / "results/official", "--brief", "--task", "sst2")
    assert code == 0 and "sst2" in out and "sentences" not in out
    code, _, err = dpft("report", ROOT / "results/official", "--task", "sentence")
    assert code == 2 and "did you mean 'sentences'?" in err


def test_an_empty_folder_says_so(tmp_path):
    assert "no runs yet" in Report([], Store(tmp_path), Options()).brief()[0]


def test_brief_is_a_report_of_its_own(dpft):
    assert dpft("report", ROOT / "results/official", "--brief", "--theory")[0] == 2


def test_a_spoilt_ledger_is_no_traceback_in_any_report(tmp_path, dpft):
    """`--methods` ended with code 70 where a release is null."""
    for path in sorted(loose("clicks").glob("*")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        if record["spec"]["method"] == "dp-fest":
            record["privacy"]["ledger"][0]["releases"] = [None]
            path.write_text(json.dumps(record))
    for report in ("--methods", "--brief", "--predictions"):
        code, out, err = dpft("report", tmp_path, report)
        assert code == 0 and "Traceback" not in err, err

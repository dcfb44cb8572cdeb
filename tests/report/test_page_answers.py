"""What the page says first: who leads, who is level, what it costs; and that a view can be shared, saved and printed."""

import csv
import itertools
import os
import re
import signal
import subprocess
import sys

import pytest
import report_cases
from pages import ROOT, index_of, unpacked
from studies import loose

from dpft.harness import report
from dpft.harness.records.store import Store
from dpft.harness.report import page

SEEDS = range(12)
GAINS = {"dp-adam": 0.80, "dp-lora": 0.80, "last-layer": 0.75}  # dp-lora is now better and now worse by a little


def study(seeds=SEEDS):
    """Three methods over many seeds, of which dp-lora is the cheapest, and two controls of one seed."""
    first = {r["spec"]["method"]: r for r in report_cases.records("official", task="sentences")}
    found = [report_cases.changed(first["non-private"], final=0.9), first["noise-only"]]
    for method, seed in itertools.product(GAINS, seeds):
        final = GAINS[method] + (0.001 * (-1) ** seed - 0.0001) * (method == "dp-lora")
        record = report_cases.changed(first[method], final=final, seed=seed)
        cheap = 0.5 if method == "dp-lora" else 1.0
        record["cost"] |= {"step_s": cheap, "step_cpu_s": cheap, "peak_bytes": {"all": int(cheap * 2**30)}}
        found.append(record)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(page of the study, its index)."""
    folder = tmp_path_factory.mktemp("told")
    index = index_of(folder, study())
    return folder / "page.html", index


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of a real study: 3 seeds, two tasks, learning rates, controls."""
    path = tmp_path_factory.mktemp("full") / "page.html"
    store = Store(ROOT / "results/full")
    page.write(path, store, store.each())
    return path


def test_the_answer_names_the_leader_the_ties_and_the_cheapest_of_them(told):
    ((one,),) = ([line for line in answer["lines"]] for answer in told[1]["answers"])
    assert one["cannot"] is None and one["budget"] == "ε ≤ 8"
    assert one["text"].startswith("**dp-adam** leads (accuracy 0.800 ± 0.000; non-private 0.900); ")
    assert "not shown to be worse: dp-lora; " in one["text"] and "last-layer" not in one["text"]
    assert one["text"].endswith("the cheapest of these is **dp-lora** (0.50 of the step time of dp-adam).")
    assert (
        one["evidence"]
        == "3 methods, seeds 0 to 11. Against dp-adam: no difference shown: 1 method; worse: last-layer."
    )
    verdicts = {row["label"]: row["verdict"] for row in told[1]["rows"]}
    assert verdicts["last-layer"].startswith("worse (-0.0500") and verdicts["dp-adam"] == "the baseline"


def test_of_rows_of_one_method_none_is_both_level_and_worse(tmp_path):
    """All rows of `users` are dp-adam's, so the best of them is leader and baseline in one."""
    store = Store(ROOT / "results/users")
    page.write(tmp_path / "page.html", store, store.each())
    ((two, eight),) = (answer["lines"] for answer in unpacked(tmp_path / "page.html", "index")["answers"])
    assert "not shown to be worse: uls, group size 8, uls, group size 2; " in two["text"]
    assert (
        two["evidence"].startswith("8 methods, seeds 0 to 29. Worse than it: ")
        and "uls, group size 8" not in two["evidence"]
    )
    assert "Against" not in eight["evidence"]


def test_of_two_seeds_nothing_can_be_told_and_the_page_says_how_many_could(tmp_path):
    ((line,),) = (answer["lines"] for answer in index_of(tmp_path, study(range(2)))["answers"])
    assert (
        line["cannot"]
        == "Nothing can be told: 2 seeds cannot show a difference between 3 methods whatever the data; 7 could."
    )
    assert "leads" not in line["text"] and "The best mean is that of" in line["text"]


def test_with_the_seeds_it_asks_for_something_can_be_told(tmp_path):
    ((line,),) = (answer["lines"] for answer in index_of(tmp_path, study(range(7)))["answers"])
    assert line["cannot"] is None and "leads" in line["text"]


def test_another_clipping_rule_of_the_baseline_is_not_called_another_learning_rate(tmp_path):
    more = [r for r in study([1]) if r["spec"]["method"] in ("dp-adam", "last-layer")]
    (adam,) = (r for r in study([0]) if r["spec"]["method"] == "dp-adam")
    index = index_of(tmp_path, [*study([0]), *more, report_cases.changed(adam, clipping="automatic")])
    found = {row["label"]: row["verdict"] for row in index["rows"]}
    assert found["dp-adam (automatic)"] == found["dp-lora"] == "not compared: no two seeds shared with the baseline"
    assert "the baseline" in found.values() and found["last-layer"].startswith("cannot tell with 2 seeds")


def test_without_runs_it_says_so(tmp_path, opened):
    page.write(tmp_path / "page.html", Store(tmp_path), [])
    assert "Nothing can be told yet" in opened(tmp_path / "page.html").locator("#answers").inner_text()


def test_the_page_opens_with_the_answer_then_costs_then_the_table(told, opened):
    tab = opened(told[0])
    assert tab.locator("h2").all_inner_texts()[:4] == ["The answer", "What it costs", "All methods", "Curves"]
    assert "dp-adam leads" in tab.locator("#answers").inner_text()
    assert tab.locator("#answers strong").all_inner_texts() == ["dp-adam", "dp-lora"]
    controls = tab.locator("#scatter text.control").all_text_contents()
    assert (
        controls == ["non-private 0.9"]
        and "Off the scale: noise-only 0.49" in tab.locator("#scatter-note").inner_text()
    )
    foot = tab.locator("#foot").inner_text()
    assert re.search(r"Records made 2026-\d\d-\d\d", foot) and "Commit" in foot and "torch 2." in foot


def test_the_picture_has_the_front_of_the_report_and_says_value_and_seeds(full, opened):
    tab, store = opened(full), Store(ROOT / "results/full")
    found = re.findall(
        r"Pareto front of mean accuracy against memory: ([^;]*)", report.markdown(store.records(), store)
    )
    index = unpacked(full, "index")
    for group, names in zip(index["groups"], found, strict=True):
        assert {index["rows"][i]["name"] for i in group["fronts"]["peak"]} == set(
            names.partition(". Memory")[0].split(", ")
        )
    tab.select_option("#scatter-group", index["groups"][0]["title"])
    assert tab.locator("#scatter .on-front").count() == len(index["groups"][0]["fronts"]["peak"])
    tab.wait_for_selector("#chart .mean")
    box = tab.locator("#scatter")
    spot = tab.locator("#scatter .on-front").last
    x, y = (float(spot.get_attribute(key)) for key in ("cx", "cy"))
    box.hover(position={"x": x + 3, "y": y})
    said = tab.locator("#scatter-values").inner_text()
    assert re.search(r"accuracy 0\.\d+ .* MiB; .*seed 0: 0\.\d+, seed 1: 0\.\d+", said)
    tab.select_option("#scatter-x", "step_s")
    assert "time of a step" in box.text_content()
    box.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    tab.locator("#details table.ledger").wait_for()


def test_an_address_gives_the_same_view_again(full, opened):
    tab = opened(full)
    tab.fill("#search", "dp-adam")
    tab.locator("#table thead button", has_text="Step time").click()
    tab.locator(".unfold").first.click()
    tab.select_option("#chart-x", "epsilon")
    tab.select_option("#scatter-x", "step_s")
    tab.locator("tr.row input").first.click()
    tab.locator("tr.rate .open").first.click()
    tab.locator("#details dl").first.wait_for()

    def seen(one):
        one.wait_for_selector("#chart .mean")
        ids = ("search", "chart-x", "scatter-x")
        return (
            [one.locator(f"#{name}").input_value() for name in ids],
            one.locator("#table tbody").inner_text(),
            one.locator("#legend").inner_text(),
            one.locator("#details-title").inner_text(),
            one.locator("#details").is_visible(),
        )

    while "run=" not in (view := tab.evaluate("location.hash.slice(1)")):
        tab.wait_for_timeout(20)
    assert seen(opened(full, view=view)) == seen(tab) and seen(tab)[-1]
    tab.evaluate("location.hash = ''")
    tab.locator("#details").wait_for(state="hidden")
    assert tab.locator("#search").input_value() == "" and tab.locator("tr.rate").count() == 0


def test_what_the_table_shows_is_saved_as_csv(full, opened):
    tab = opened(full, view="q=dp-adam", accept_downloads=True)
    with tab.expect_download() as saved:
        tab.locator("#csv").click()
    with open(saved.value.path(), newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    wanted = [r for r in unpacked(full, "index")["rows"] if r["method"] == "dp-adam"]
    assert sorted(line["run_ids"] for line in lines) == sorted(" ".join(row["ids"]) for row in wanted)
    assert {line["final"] for line in lines} == {str(row["final"]) for row in wanted}
    cell = tab.evaluate("['=1+1', '-0.5', -0.5, 'a,\"b\"', null].map(csvCell)")
    assert cell == ["'=1+1", "-0.5", "-0.5", '"a,""b"""', ""], "no text becomes a formula"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_paper_show_all_of_it(full, opened, scheme):
    tab = opened(full, width=390, color_scheme=scheme)
    tab.wait_for_selector("#chart path.mean")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    back = "getComputedStyle(document.body).backgroundColor"
    assert (tab.evaluate(back) == "rgb(255, 255, 255)") == (scheme == "light")
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(back) == "rgb(255, 255, 255)", "paper is white"
    assert not tab.locator("#filters").is_visible() and not tab.locator("#csv").is_visible()
    assert tab.locator("tr.group").first.is_visible() and tab.locator("#scatter").is_visible()


def test_a_watched_page_follows_its_folder_keeps_its_view_and_ends(tmp_path, opened):
    runs, path = tmp_path / "runs", tmp_path / "page.html"
    runs.mkdir()

    def add(files):
        for file in files:
            for name in (file.with_suffix(".parquet"), file):
                (runs / name.name).symlink_to(name)

    first, *rest = sorted(loose("official").glob("*.json"))
    add([first])
    command = [sys.executable, "-m", "dpft.harness", "report", str(runs), "--html", str(path), "--watch"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stderr.readline() == f"{path}: 1 runs; Ctrl-C ends.\n"
        tab = opened(path, view="q=lora")
        assert "1 runs" in tab.locator("#summary").inner_text()
        add(rest)
        tab.locator("#summary", has_text=f"{1 + len(rest)} runs").wait_for(timeout=40_000)
        tab.wait_for_selector("html[data-ready]")
        assert tab.locator("#search").input_value() == "lora"
    finally:
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.wait() == 130 and "interrupted" in err and "Traceback" not in err
    assert "data-follow=" not in path.read_text() and not list(tmp_path.glob(".*.tmp")), (
        "the page that is left stands still"
    )


def test_a_record_is_read_again_only_where_it_changed(tmp_path, monkeypatch):
    from dpft.harness.report.page import follow

    store = report_cases.store_of(tmp_path / "runs", study(range(2)))
    read, sizes = [], []
    monkeypatch.setattr(
        Store, "summary", lambda self, run_id, read_one=Store.summary: read.append(run_id) or read_one(self, run_id)
    )

    def looked(_):
        if len(sizes) == 2:
            raise KeyboardInterrupt
        if len(sizes) == 1:
            other = report_cases.changed(study(range(1))[-1], final=0.5, seed=77)
            report_cases.store_of(tmp_path / "runs", [other])
            read.clear()

    monkeypatch.setattr(follow.time, "sleep", looked)
    with pytest.raises(KeyboardInterrupt):
        follow.follow(tmp_path / "page.html", store, report.Options(), None, sizes.append)
    assert sizes == [8, 9] and len(read) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--watch"], "--watch keeps one page fresh"),
        (["--watch", "--html", "{}/page.html", "--csv", "{}/x.csv"], "--watch keeps one page fresh"),
        (["--watch", "--html", "{}"], "is a directory"),
        (["--watch", "--html", "{}/lacking/page.html"], "No such file or directory"),
        (["--html", "{}/page.html", "--baseline", "dp-nothing"], "dp-nothing"),
        (["--html", "{}/page.html", "--task", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_is_one_sentence(dpft, tmp_path, arguments, said):
    code, _, err = dpft("report", ROOT / "results/official", *(a.format(tmp_path) for a in arguments))
    assert code == 2 and said in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_watched_folder_must_be_there(dpft, tmp_path):
    code, _, err = dpft("report", tmp_path / "none", "--html", tmp_path / "page.html", "--watch")
    assert code == 2 and "There is no results folder" in err and len(err.splitlines()) == 1

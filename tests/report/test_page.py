"""The page in a real headless Chromium, from file:// and without a network: what a reader does with mouse, keyboard and phone."""

import json
import re
import time
from pathlib import Path

import pytest
import report_cases
from pages import HOSTILE, ROOT, clones, index_of, unpacked
from studies import loose

from dpft.harness.records.store import Store
from dpft.harness.report import page


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """(page of 10,000 runs, its store, seconds of writing it without reading the records)."""
    store = clones(tmp_path_factory.mktemp("many") / "runs", 10_000)
    records, path = store.records(), store.folder.parent / "page.html"
    start = time.process_time()
    page.write(path, store, records)
    return path, store, time.process_time() - start


def column(tab, title):
    heads = tab.locator("#table thead th").all_inner_texts()
    at = next(i for i, head in enumerate(heads) if head.startswith(title))
    return [row.locator("td").nth(at).inner_text() for row in tab.locator("tr.row").all()[:30]]


def test_ten_thousand_runs_are_written_and_opened_fast(big, opened):
    assert big[2] < 30, "10 s on a free core; the curves are read here too"
    start = time.monotonic()
    tab = opened(big[0])
    assert time.monotonic() - start < 10, "3 s on a free core"
    assert "10,000 runs" in tab.locator("#summary").inner_text()
    assert tab.locator("tr.row").count() <= 100, "the table is paged"
    first = tab.locator("#table .open").first.inner_text()
    tab.get_by_role("button", name="Next").click()
    assert tab.locator("#page-number").inner_text().startswith("Page 2 of") and first


def test_a_column_sorts_both_ways_and_says_so(big, opened):
    tab = opened(big[0])
    head = tab.locator("#table thead th", has_text="lr")
    for state, sign in (("ascending", 1), ("descending", -1)):
        head.locator("button").focus()
        tab.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == state
        rates = [float(text) for text in column(tab, "lr")]
        assert rates == sorted(rates, key=lambda rate: sign * rate)
    tab.get_by_role("button", name="Back to groups").click()
    assert head.get_attribute("aria-sort") == "none"


def test_filters_and_search_narrow_the_table(big, opened):
    tab = opened(big[0])
    tab.select_option("#filter-task", label="sentences-3")
    tab.select_option("#filter-method", label="dp-adam")
    assert set(column(tab, "Task")) == {"sentences-3"} and all("dp-adam" in name for name in column(tab, "Method"))
    tab.get_by_role("button", name="Clear").click()
    tab.select_option("#filter-status", label="oom")
    tab.locator("tr.row").first.wait_for()
    assert set(column(tab, "Status")) == {"oom"} and all("Reason" in name for name in column(tab, "Method"))
    tab.get_by_role("button", name="Clear").click()
    tab.fill("#search", "reason 9949.")
    tab.locator("tr.row").nth(1).wait_for(state="detached")
    assert "Reason 9949." in tab.locator("tr.row").inner_text()


def test_a_run_opens_by_mouse_and_by_keyboard_with_its_ledger(big, opened):
    tab = opened(big[0])
    dialog = tab.locator("#details")
    tab.locator("tr.row td").nth(4).click()
    dialog.locator("table.ledger").wait_for()
    assert (
        "Certificate" in dialog.inner_text() and "ε ≤" in dialog.inner_text() and "cross-checks" in dialog.inner_text()
    )
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    link = tab.locator(".open").nth(3)
    link.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    dialog.locator("dl").first.wait_for()
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert tab.evaluate("document.activeElement.className") == "open", "focus goes back to where it was"


def test_curves_are_drawn_chosen_and_read_by_keyboard(big, opened):
    tab = opened(big[0])
    tab.wait_for_selector("#chart path.mean")
    before = tab.locator("#legend li").count()
    name = tab.locator("tr.row input:not(:checked):enabled").first.get_attribute("aria-label")
    tab.get_by_label(name, exact=True).first.check()
    assert tab.locator("#legend li").count() == before + 1
    tab.select_option("#chart-x", "epsilon")
    tab.locator("#chart").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#chart-values").inner_text().startswith("ε ")


def test_a_phone_scrolls_only_inside_boxes(big, opened):
    tab = opened(big[0], width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.locator(".open").first.click()
    tab.locator("#details dl").first.wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_nothing_in_a_record_becomes_code(opened, big):
    tab = opened(big[0])
    tab.select_option("#filter-status", label="error")
    assert HOSTILE in tab.locator("tr.row .reason").first.inner_text()
    tab.locator(".open").first.click()
    tab.locator("#details .warning").wait_for()
    assert HOSTILE in tab.locator("#details .warning").inner_text()
    assert tab.title() == "dpft results" and tab.locator("img").count() == 0
    assert HOSTILE not in big[0].read_text()


def test_the_page_and_the_markdown_rank_alike(dpft_report):
    text, index = dpft_report
    ranks = re.findall(r"^\|\s*(\d+) \|\s*(.*?) \|", text, re.MULTILINE)
    rows = sorted((row for row in index["rows"] if row["rank"]), key=lambda row: row["order"])
    assert [(str(row["rank"]), row["name"]) for row in rows] == ranks
    assert not any(row["rank"] for row in index["rows"] if row["method"] in ("non-private", "noise-only"))


@pytest.fixture
def dpft_report(tmp_path):
    from dpft.harness import report

    store = Store(ROOT / "results/full")
    page.write(tmp_path / "page.html", store, store.each())
    return report.markdown(store.records(), store), unpacked(tmp_path / "page.html", "index")


def test_unmatched_budgets_are_not_ranked(tmp_path):
    chosen = report_cases.records(task="sentences", lr=1e-4, seed=0)
    chosen = [report_cases.shorter(r, 8) if r["spec"]["method"] == "dp-adam" else r for r in chosen]
    index = index_of(tmp_path, chosen)
    assert "differ in steps_planned" in index["groups"][0]["reason"]
    assert not any(row["rank"] for row in index["rows"])
    assert {row["verdict"] for row in index["rows"]} == {"not ranked"}
    ((line,),) = (answer["lines"] for answer in index["answers"])
    assert line["cannot"].startswith("Nothing is ranked: ") and line["text"] == ""


def test_public_leaves_out_what_epsilon_does_not_cover(tmp_path):
    store = Store(ROOT / "results/official")
    page.write(tmp_path / "all.html", store, store.each())
    page.write(tmp_path / "public.html", store, store.each(), public=True)
    everything, public = (unpacked(tmp_path / f"{name}.html", "block-0")[0] for name in ("all", "public"))
    assert everything["diagnostics"]["alignment"] and "loss" in everything["curve"]
    assert public["diagnostics"] is None and set(public["curve"]) == {"step", "epsilon", "metric"}
    index = json.dumps(unpacked(tmp_path / "public.html", "index"))
    assert not any(word in index for word in ("loss", "alignment", "clipped"))


def test_texts_are_shown_beside_each_other_and_are_in_no_public_page(tmp_path, opened):
    source = next(iter(sorted(loose("official").glob("*.json"))))
    record = json.loads(source.read_text())
    text = {"prompt": "food : <b>Thai</b> ||", "reference": "They serve Thai."}
    samples = {when: [{**text, "output": f"{when} it"}] for when in ("before", "after")}
    record["result"] = {**record["result"], "samples": samples}
    (tmp_path / source.name).write_text(json.dumps(record))
    (tmp_path / f"{source.stem}.parquet").symlink_to(source.with_suffix(".parquet"))
    store = Store(tmp_path)
    page.write(tmp_path / "public.html", store, store.each(), public=True)
    assert "samples" not in unpacked(tmp_path / "public.html", "block-0")[0]["result"]
    page.write(tmp_path / "page.html", store, store.each())
    tab = opened(tmp_path / "page.html")
    tab.locator("tr.row td").nth(4).click()
    body = tab.locator("#details-body").inner_text()
    for said in ("food : <b>Thai</b> ||", "They serve Thai.", "before it", "after it"):
        assert said in body
    assert "[object" not in body


def test_no_runs_give_a_page_that_says_so(tmp_path, opened):
    page.write(tmp_path / "page.html", Store(tmp_path), [])
    tab = opened(tmp_path / "page.html")
    assert "none yet" in tab.locator("#summary").inner_text()


def test_a_method_has_one_row_with_its_verdict_and_the_rates_it_tried(dpft_report):
    text, index = dpft_report
    for number in range(len(index["groups"])):
        kept = [row for row in index["rows"] if row["kept"] and number in row["groups"]]
        names = [(row["method"], row["settings"]) for row in kept]
        assert len(names) == len(set(names)) and sum(row["method"] == "dp-adam" for row in kept) == 1
        assert [row["rank"] for row in sorted(kept, key=lambda row: row["order"])] == list(range(1, len(kept) + 1))
        tried = {row["method"]: row["tried"] for row in kept if not row["settings"]}
        assert tried["dp-adam"] == (3, 4)[number] and tried["rmt"] == (1, 3)[number]
        for row in kept:
            cannot = "cannot tell with 3 seeds: smallest p is 0.25 ("
            assert row["verdict"] == "the baseline" if row["method"] == "dp-adam" else row["verdict"].startswith(cannot)
    others = [row for row in index["rows"] if not row["kept"]]
    assert {row["verdict"] for row in others} == {"another learning rate"} and not any(row["rank"] for row in others)


def test_memory_and_times_are_those_of_the_report(tmp_path):
    chosen = report_cases.records(task="sentences", lr=1e-4)
    for i, record in enumerate(chosen):  # seeds that differ
        record["cost"]["peak_bytes"] = {"all": (100 + 7 * i * i) * 2**20}
        record["cost"]["step_s"] = 1.0 + 0.1 * i * i
    index = index_of(tmp_path, chosen)
    text = report_cases.text_of(tmp_path / "again", chosen)
    lines = {line["method"]: line for line in report_cases.lines(text)}
    assert {row["name"] for row in index["rows"]} == set(lines)
    for row in index["rows"]:
        assert f"{row['peak'] / 2**20:,.0f} MiB" == lines[row["name"]]["peak memory"]
        assert f"{row['step_s']:.2f} s" == lines[row["name"]]["step time"]


def test_failures_and_what_does_not_verify_are_said_in_the_row(tmp_path):
    chosen = report_cases.records(task="sentences", lr=1e-4)
    lost = [r for r in chosen if r["spec"]["method"] == "rmt" and r["spec"]["seed"]]
    spoilt = next(r for r in chosen if r["spec"]["method"] == "rmt-paper")
    spoilt["privacy"]["within_budget"] = False
    chosen = [report_cases.failed(r) if r in lost else r for r in chosen]
    index = index_of(tmp_path, chosen)
    rows = {row["name"]: row for row in index["rows"] if row["groups"]}
    assert rows["rmt"]["rank"] is None and rows["rmt"]["runs"] == "1/3"
    assert rows["rmt"]["verdict"] == "not ranked: 2 of 3 seeds failed (seed 1: diverged, seed 2: diverged)"
    assert rows["rmt-paper"]["rank"] is None
    assert f"run {spoilt['run_id']} does not verify" in rows["rmt-paper"]["verdict"]
    assert sorted(row["rank"] for row in rows.values() if row["rank"]) == [1, 2, 3]


def test_the_table_and_the_curves_say_what_they_are_measured_on(tmp_path, opened):
    store = Store(ROOT / "results/full")
    page.write(tmp_path / "page.html", store, store.each())
    tab = opened(tmp_path / "page.html")
    tab.wait_for_selector("#chart path.mean")
    assert "accuracy on 218 validation examples" in tab.locator("#chart").text_content()
    heads = tab.locator("#table thead th").all_inner_texts()
    assert [head for head in heads if head.startswith(("Verdict", "Final, whole split", "Rates tried", "Runs"))]
    assert "the baseline" in column(tab, "Verdict") and column(tab, "Rates tried")[0] == "3 ▸"
    before = tab.locator("tr.row").count()
    tab.locator(".unfold").first.click()
    assert tab.locator("tr.row").count() == before + tab.locator("tr.rate").count() == before + 2


def test_no_two_scripts_define_one_name():
    """They share one scope: two `drawn` once left the page without its curves."""
    folder = Path(page.__file__).parent
    named = re.findall(
        r"^(?:function|const|let|class) (\w+)", "\n".join(f.read_text() for f in folder.glob("*.js")), re.MULTILINE
    )
    assert len(named) == len(set(named)), sorted({name for name in named if named.count(name) > 1})

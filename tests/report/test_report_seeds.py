"""Tables rank on equal seeds: failures count, nothing missing is paired, no seed counts twice."""

import re

import pytest
from report_cases import ROOT, changed, failed, lines, ranks, records, shorter, store_of, text_of

from dpft.harness import cli, report
from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store
from dpft.harness.report import View
from dpft.harness.report.rows import Row, on_equal_seeds
from dpft.harness.runs import suites

SEEDS_FAILED = "2 of 3 seeds failed (seed 1: diverged, seed 2: diverged)"


def sentences(*methods):
    """Three seeds of each method at lr 1e-4, one table."""
    return [r for r in records(task="sentences", lr=1e-4) if r["spec"]["method"] in methods]


def with_failures(chosen, method, seeds=(1, 2), luck=0.99):
    """Those seeds of a method diverged, and the others did very well."""
    found = []
    for record in chosen:
        if record["spec"]["method"] == method:
            lost = record["spec"]["seed"] in seeds
            found.append(failed(record) if lost else changed(record, final=luck))
        else:
            found.append(record)
    return found


def test_a_method_whose_seeds_diverged_has_no_rank_and_sets_no_target(tmp_path):
    chosen = sentences("dp-adam", "rmt", "rmt-momentum")
    before = text_of(tmp_path / "before", chosen)
    assert ranks(before) == {"rmt": "1", "dp-adam": "2", "rmt-momentum": "3"}
    for method in ("rmt-momentum", "dp-adam"):
        text = text_of(tmp_path / method, with_failures(chosen, method))
        place = list(ranks(text))
        assert ranks(text)[method] == "" and place[-1] == method, "below those that are complete"
        assert f"**Without a rank**: {method}: {SEEDS_FAILED}." in text
        assert {line["method"]: line["runs"] for line in lines(text)}[method] == "1/3"
        assert "Ranks are over seeds 0 to 2." in text
        assert float(text.split("Threshold: ")[1][:6]) < 0.85
        front = text.split("Pareto front")[1].split("\n")[0]
        assert method not in front.split("Memory within")[0].split(": ", 1)[1].replace("; ", ", ").split(", ")
        paired = [block for block in text.split("\n\n") if block.startswith("|") and "Holm's p" in block]
        assert len(paired) == (method != "dp-adam") and all(f"| {method} " not in block for block in paired)


def test_a_learning_rate_is_not_chosen_by_the_seeds_that_survived(tmp_path):
    chosen = records(task="sst2", method="rmt-momentum") + records(task="sst2", method="dp-adam", lr=0.002)
    lucky = []
    for record in chosen:
        if record["spec"]["method"] == "rmt-momentum" and record["spec"]["lr"] == 0.001:
            lucky.append(failed(record) if record["spec"]["seed"] else changed(record, final=0.99))
        else:
            lucky.append(record)
    text = text_of(tmp_path, lucky)
    assert ranks(text) == {"dp-adam": "1", "rmt-momentum (lr=0.002)": "2"}
    assert "0.0005, 0.002; failed: 0.001" in text
    gone = [failed(r) if r["status"] == "done" and r["spec"]["lr"] == 0.001 else r for r in lucky]
    text = text_of(tmp_path / "gone", gone)
    assert ranks(text) == {"dp-adam": "1", "rmt-momentum (lr=0.002)": "2"}
    assert "0.0005, 0.002; failed: 0.001" in text and "(0.0005, 0.001, 0.002)" in text, "a rate that failed was tried"


def test_a_method_that_only_has_flawed_rates_is_shown_with_its_reason(tmp_path):
    chosen = records(task="sst2", method="rmt-momentum") + records(task="sst2", method="dp-adam", lr=0.002)
    flawed = [failed(r) if r["spec"]["method"] != "dp-adam" and r["spec"]["seed"] == 1 else r for r in chosen]
    text = text_of(tmp_path, flawed)
    assert "(lr=0.002): 1 of 3 seeds failed (seed 1: diverged)" in text and "Paired differences" not in text


def test_ranks_are_over_the_seeds_that_most_rows_have(tmp_path):
    chosen = sentences("dp-adam", "rmt", "rmt-momentum")
    more = [changed(r, final=0.99, seed=7) for r in sentences("rmt-momentum") if r["spec"]["seed"] == 0]
    text = text_of(tmp_path / "more", chosen + more)
    found = {line["method"]: line for line in lines(text)}
    assert found["rmt-momentum"]["#"] == "3" and found["rmt-momentum"]["final accuracy"].startswith("0.6750 ± ")
    assert found["rmt-momentum"]["runs"] == "4/4" and "Ranks are over seeds 0 to 2." in text
    less = [r for r in chosen if r["spec"]["method"] != "rmt-momentum"]
    less += [changed(r, final=0.99) for r in sentences("rmt-momentum") if r["spec"]["seed"] == 0]
    text = text_of(tmp_path / "less", less)
    assert ranks(text) == {"rmt": "1", "dp-adam": "2", "rmt-momentum": ""}
    assert "rmt-momentum: seeds 1, 2 not run" in text
    apart = [
        changed(r, seed=r["spec"]["seed"] + 10 * i) for i, m in enumerate(("dp-adam", "rmt")) for r in sentences(m)
    ]
    text = text_of(tmp_path / "apart", apart)
    assert set(ranks(text).values()) == {""} and "no seed is shared by most rows" in text


def test_pairs_are_of_seeds_that_both_have(tmp_path):
    """The baseline has a fourth seed that the ranks are not over; nothing stands in for it."""
    chosen = sentences("dp-adam", "rmt", "rmt-paper")
    more = [changed(r, final=0.1, seed=7) for r in chosen if (r["spec"]["method"], r["spec"]["seed"]) == ("dp-adam", 0)]
    text = text_of(tmp_path, chosen + more)
    assert [line["seeds"] for line in lines(text, 1)] == ["3", "3"]


def test_the_baseline_is_the_one_with_the_most_seeds(tmp_path):
    """Ranks are over seed 0 here, on which a baseline of one seed is ahead; the pairs are with the one of three seeds."""
    chosen = sentences("dp-adam", "rmt")
    one = [changed(r, final=0.79, momentum=0.5) for r in chosen if r["spec"]["seed"] == 0]
    text = text_of(tmp_path, chosen + one + [changed(r, momentum=0.6) for r in one])
    assert "Ranks are over seed 0." in text and "to `dp-adam (momentum=0.0)` over shared seeds" in text


def test_settings_together_leave_out_those_whose_baseline_ended_at_chance(tmp_path, recwarn):
    chosen = sentences("dp-adam", "rmt")
    chance = chosen[0]["result"]["chance"]
    three = (
        chosen + [changed(r, task="reviews") for r in chosen] + [changed(r, task="sst2", final=chance) for r in chosen]
    )
    text = text_of(tmp_path, three)
    assert "All 2 ranked settings together" in text and "their best DP baseline ended at chance: 1." in text
    assert not recwarn.list and "nan" not in text


def test_settings_together_leave_out_methods_that_failed_in_one(tmp_path):
    chosen = [*sentences("dp-adam", "rmt", "rmt-momentum")]
    both = chosen + [changed(r, task="reviews") for r in chosen]
    text = text_of(tmp_path / "both", both)
    assert "All 2 ranked settings together" in text
    text = text_of(tmp_path / "failed", with_failures(both, "rmt-momentum"))
    (together,) = (part for part in text.split("### ") if part.startswith("All 2"))
    assert "| rmt " in re.sub(" +", " ", together) and "| rmt-momentum " not in re.sub(" +", " ", together)


def test_only_the_best_rate_of_a_method_has_a_rank(tmp_path):
    text = text_of(tmp_path, records(task="sst2"))
    found = ranks(text)
    of_baseline = {name: rank for name, rank in found.items() if name.startswith("dp-adam")}
    assert sorted(of_baseline.values()) == ["", "", "", "1"]
    assert sorted(int(rank) for rank in found.values() if rank) == [1, 2, 3, 4, 5, 6, 7]
    assert "other learning rates of a method that has a rank" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--task", "low-rank", "--method", "dp-sgd", "--seeds", "1,1"],
        ["plan", "--task", "low-rank", "--method", "dp-sgd", "--lr", "1e-3,0.001"],
        ["plan", "--task", "low-rank", "--method", "dp-sgd,dp-sgd"],
        ["plan", "--task", "low-rank", "--method", "dp-sgd", "--set", "momentum=[0.5, 0.5]"],
    ],
)
def test_a_value_named_twice_is_refused(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["dpft", *arguments, "--results", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "twice; give each value once." in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_suite_that_names_a_value_twice_is_refused(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('[own]\nbase = {task = "low-rank", seed = [0, 1, 0]}\narms = [{method = "dp-sgd"}]\n')
    with pytest.raises(BadInput, match="grid of seed has 0 twice"):
        suites.load_suite(str(path))


def test_one_seed_counts_once(tmp_path):
    """The same run given twice is one; two files of one configuration and seed are none, and are named."""
    chosen = sentences("dp-adam", "rmt")
    store = store_of(tmp_path, chosen)
    found = report.summaries(store)
    assert report.markdown(found + found, store) == report.markdown(found, store)
    copy = next(store.folder.glob("*.json"))
    (store.folder / ("0" * 16 + ".json")).write_text(copy.read_text().replace(copy.stem, "0" * 16))
    (store.folder / ("0" * 16 + ".parquet")).symlink_to(copy.with_suffix(".parquet").resolve())
    text = report.markdown(report.summaries(store), store)
    assert f"`{'0' * 16}` and `{copy.stem}` are the same configuration and seed" in text
    assert sorted(line["runs"] for line in lines(text)) == ["2/2", "3/3"]


def test_a_view_counts_failures_too(tmp_path):
    chosen = with_failures(sentences("dp-adam", "rmt", "rmt-momentum"), "rmt-momentum")
    chosen = [shorter(r, 8) if r["spec"]["method"] == "dp-adam" else r for r in chosen]
    for name in ("budget", "compute", "time"):
        text = text_of(tmp_path / name, chosen, view=View(name))
        assert ranks(text)["rmt-momentum"] == "" and SEEDS_FAILED in text


def test_the_committed_records_are_whole():
    for folder in ("official", "full", "noise", "sparse", "generation"):
        store = Store(ROOT / "results" / folder)
        text = report.markdown(report.summaries(store), store)
        assert "Without a rank" not in text and "Not ranked" not in text


def test_the_time_to_find_equal_seeds_grows_with_the_seeds_and_not_with_their_square(monkeypatch):
    """50,000 runs: the finals of a row were gathered for each of its seeds, four fifths of a report's time."""
    (one,) = records(task="sentences", lr=1e-4, method="dp-adam", seed=0)
    rows = [
        Row(one["spec"] | {"method": method}, [{**one, "spec": {**one["spec"], "seed": i}} for i in range(more + 30)])
        for method, more in (("dp-adam", 0), ("dp-lora", 0), ("rmt", 2))
    ]
    asked, finals = [], Row.finals.fget
    monkeypatch.setattr(Row, "finals", property(lambda row: asked.append(row) or finals(row)))
    kept, seeds = on_equal_seeds(rows)
    assert seeds == tuple(range(30)) and [len(row.records) for row in kept] == [30] * 3
    assert [len(row.spare) for row in kept] == [0, 0, 2] and len(asked) <= 2 * len(rows)

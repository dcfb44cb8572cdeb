"""The committed leaderboard: what it may claim, proven from its records."""

import functools

import pytest
from studies import ROOT

from dpft.harness.leaderboard import board, driver, state
from dpft.harness.records.store import Store
from dpft.harness.regression import baseline
from dpft.harness.report import leaderboards
from dpft.harness.runs import registry
from dpft.tasks import halves

STORE = Store(ROOT / "results/vision")
BOARD = board.load("vision")


WHERE = {"vision": "on images", "leaderboard": "on text", "writing": "in writing"}


@pytest.fixture(scope="module")
def look():
    return looking("vision")


@functools.cache
def looking(name):
    return driver.looking(Store(ROOT / "results" / name))


@functools.cache
def standings(name):
    """[(contest, its standings)] of a board."""
    made = board.load(name)
    return [(contest, state.standings(contest, made.rules, looking(name))) for contest in made.contests]


def test_tuning_and_tests_share_no_example_and_no_seed(look):
    task = registry.task("digits")()
    data = task.load(None)
    rows = {split: halves.judged(task, data, split).validation for split in ("tune", "test")}
    names = {split: {task.identity(row) for row in found} for split, found in rows.items()}
    assert not names["tune"] & names["test"] and len(rows["tune"]) + len(rows["test"]) == len(data.validation)
    seeds, seen = {"tune": set(), "test": set()}, 0
    for record in STORE.each():
        spec = record["spec"]
        seeds[spec["split"]].add(spec["seed"])
        if record["status"] == "done":
            seen += 1
            assert record["provenance"]["validation_examples"] == len(rows[spec["split"]])
    assert seen > 1000 and not seeds["tune"] & seeds["test"]


@pytest.mark.parametrize("name, examples", [("leaderboard", 1000), ("writing", 64), ("half-epoch", 872)])
def test_the_halves_of_text_are_apart_in_its_records(name, examples):
    """Examples are by tests/tasks; here each record says how many it was judged on, and with which seed."""
    seen = {"tune": set(), "test": set()}
    for record in Store(ROOT / "results" / name).each():
        made = record["spec"]
        seen[made["split"]].add((made["seed"] >= board.TUNING, record["provenance"]["validation_examples"]))
    [tested] = seen["test"]
    if any(arm.trials > 1 for arm in board.load(name).contests[0].arms):
        [tuned] = seen["tune"]
        assert tuned[0] and tuned[1] + tested[1] == examples
    else:
        assert not seen["tune"]
    assert not tested[0] and 0.4 < tested[1] / examples < 0.6


@pytest.mark.parametrize("name", ["vision", "leaderboard", "writing", "half-epoch"])
def test_running_it_again_adds_nothing(name):
    assert list(state.wanted(board.load(name), looking(name))) == []


@pytest.mark.parametrize("name", ["vision", "leaderboard", "writing", "half-epoch"])
def test_what_a_sentence_calls_level_its_table_does_not_put_below(name):
    made = board.load(name)
    for _, found in standings(name):
        first, level, _ = state.leading(found, made.rules)
        best = "better" if first.verdict is not None and first.verdict.verdict == "better" else "level"
        below = {one.arm.name for one in level if one.verdict is not None and one.verdict.verdict == "worse"}
        if best == "better":
            assert not below and made.rules.baseline not in {one.arm.name for one in level}
        if first.arm.name == made.rules.baseline:
            assert not below


def test_half_of_the_verdicts_against_dp_adam_are_in_and_results_says_how_many():
    found = {}
    for name in ("vision", "leaderboard", "half-epoch", "writing"):
        judged = [one.verdict for _, found_there in standings(name) for one in found_there if one.verdict is not None]
        verdicts = [one.verdict != "undecided" for one in judged]
        found[name] = sum(verdicts), len(verdicts)
    decided, of = map(sum, zip(*found.values(), strict=True))
    assert decided >= of / 2 and found["half-epoch"][0] == 0
    said = " ".join((ROOT / "RESULTS.md").read_text().split())
    assert f"**{decided} of the {of} verdicts against dp-adam are in**" in said
    parts = [f"{found[name][0]} of {found[name][1]} {where}" for name, where in WHERE.items()]
    assert f"{', '.join(parts)}, none of {found['half-epoch'][1]} on SST-2." in said


def test_the_documents_say_what_the_boards_cost():
    said = " ".join((ROOT / "docs/leaderboard.md").read_text().split())
    hours = {
        name: sum(record["cost"]["total_s"] for record in Store(ROOT / "results" / name).each()) / 3600
        for name in ("vision", "leaderboard", "half-epoch", "writing")
    }
    assert f"{', '.join(f'`{name}` {spent:.1f}' for name, spent in hours.items())}." in said


def test_every_sentence_of_results_follows_from_the_records(look):
    others = [(board.load(name), looking(name)) for name in ("leaderboard", "writing", "half-epoch")]
    for made, found in [(BOARD, look), *others]:
        (text, *_) = leaderboards.answers(made, found)
        assert text in (ROOT / "RESULTS.md").read_text() and text.count("\n") == len(made.contests) - 1


def test_the_committed_baseline_is_of_its_tests(dpft, tmp_path):
    path = tmp_path / "baseline.json"
    assert dpft("check", ROOT / "results/leaderboard", "--baseline", path, "--board", "leaderboard", "--bless")[0] == 0
    assert path.read_bytes() == (ROOT / "results/baseline.json").read_bytes()
    found = baseline.load(path)
    assert {one.spec["split"] for one in found.values()} == {"test"}
    assert all(set(one.runs) <= set(range(10)) for one in found.values())
    assert {one.spec["method"] for one in found.values()} == {
        arm.settings["method"] for arm in board.load("leaderboard").contests[0].arms
    }

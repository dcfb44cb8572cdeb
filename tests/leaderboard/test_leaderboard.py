"""Leaderboards: what they want next follows from records alone, tuning and tests share nothing, seeds stop where they should."""

import dataclasses
import math
from collections import Counter

import pytest

from dpft.harness.errors import BadInput
from dpft.harness.leaderboard import board as boards
from dpft.harness.leaderboard import driver, space, state
from dpft.harness.report import leaderboards as verdicts
from dpft.harness.report.text import markdown
from dpft.harness.runs import registry

TINY = boards.load("tiny")
RULES = TINY.rules


class Outcomes(dict):
    """Records by run id, made up by `metric(spec)`; NaN: the run fails. Remembers what was made."""

    def __init__(self, metric):
        super().__init__()
        self.metric, self.made = metric, []

    def look(self, spec):
        return self.get(spec.run_id)

    def make(self, specs):
        for spec in specs:
            value = self.metric(spec)
            failed = math.isnan(value)
            result = {"metric": "accuracy", "final": value, "higher_is_better": True}
            self[spec.run_id] = {
                "status": "error" if failed else "done",
                "spec": spec.to_dict(),
                "result": None if failed else result,
                "error": "It broke." if failed else None,
                "cost": {"step_cpu_s": 1.0, "peak_bytes": {"cpu": 100}},
                "privacy": None,
            }
            self.made.append(spec)


def wobble(spec, size=0.004):
    """Noise that is a function of the run, the same for no two."""
    return (int(spec.run_id[:8], 16) / 2**32 - 0.5) * size


def finished(board, metric):
    made, rounds = Outcomes(metric), 0
    while specs := state.wanted(board, made.look):
        made.make(specs)
        rounds += 1
        assert rounds < 50
    return made


def quality(spec):
    """rmt is better by .05; the best learning rate is the largest."""
    return 0.6 + 0.05 * (spec.method == "rmt") + 0.01 * math.log10(spec.lr) + wobble(spec)


@pytest.mark.parametrize("name", sorted(boards.boards()))
def test_tuning_and_tests_share_no_seed_and_every_arm_has_equal_trials(name):
    board = boards.load(name)
    made = finished(board, quality).made
    tuning, tests = ([s for s in made if s.split == split] for split in ("tune", "test"))
    assert len(tuning) + len(tests) == len(made) == len({s.run_id for s in made})
    assert tests and not {s.seed for s in tuning} & {s.seed for s in tests}
    trials = Counter((s.method, s.epsilon) for s in tuning)
    arms = [arm for contest in board.contests for arm in contest.arms]
    assert {trials[arm.settings["method"], arm.settings["epsilon"]] for arm in arms if not arm.control} == {
        sum(board.rules.rounds(board.rules.trials))  # none where settings are named, not searched
    }
    fewest, most = board.rules.seeds
    assert all(0 <= s.seed < most for s in tests)
    for arm in arms:
        seeds = {s.seed for s in tests if s.method == arm.settings["method"]}
        assert set(range(fewest)) <= seeds


def test_the_halves_share_no_example_and_are_a_partition():
    from dpft.tasks.halves import judged

    task = registry.task("sentences")({})
    data = task.load(None)
    one, two = (judged(task, data, split) for split in ("tune", "test"))
    texts = [{row["text"] for row in half.validation} for half in (one, two)]
    assert not texts[0] & texts[1] and len(one.validation) + len(two.validation) == len(data.validation)
    assert 0.4 < len(one.validation) / len(data.validation) < 0.6
    assert one.fingerprint == two.fingerprint == data.fingerprint and one.train is data.train
    assert judged(task, data, "whole") is data


def test_one_example_with_another_label_or_reference_stays_in_its_half():
    text, pair = registry.task("sentences")({}), registry.task("e2e")({})
    assert text.identity({"text": "a", "label": 0}) == text.identity({"text": "a", "label": 1})
    assert text.identity({"text": "a", "label": 0}) != text.identity({"text": "b", "label": 0})
    assert pair.identity({"prompt": "p", "response": "x"}) == pair.identity({"prompt": "p", "response": "y"})


def test_tuning_takes_the_better_half_on_and_chooses_the_best():
    made = finished(TINY, quality)
    (contest,) = TINY.contests
    for one in state.standings(contest, RULES, made.look):
        points = one.arm.points()
        seeds = [len(scores) for _, scores in one.tuning.scores]
        if len(points) > 1:
            best = max(points, key=lambda p: one.arm.tried(p, 0).lr)
            assert one.tuning.chosen == best and sorted(seeds) == [1, 2, 2]
            assert len(one.tuning.scores[0][1]) == 2 or points[0] != best


def test_settings_that_fail_are_not_chosen_and_an_arm_that_always_fails_is_given_up():
    def metric(spec):
        broken = spec.method == "rmt" or (spec.method == "dp-adam" and spec.lr > 1.5e-4)
        return math.nan if broken else quality(spec)

    made = finished(TINY, metric)
    found = {one.arm.name: one for one in state.standings(TINY.contests[0], RULES, made.look)}
    assert found["dp-adam"].arm.tested(found["dp-adam"].tuning.chosen, 0).lr <= 1.5e-4
    assert found["rmt"].tuning.chosen is None and found["rmt"].tuning.failed == "It broke." and not found["rmt"].records
    assert state.failures(TINY.contests[0], RULES, made.look) >= 3
    text = markdown(verdicts.parts(TINY, made.look))
    assert "- rmt: It broke." in text


def test_seeds_are_added_where_it_is_open_and_to_the_baseline_and_nowhere_else():
    board = dataclasses.replace(boards.load("leaderboard"), contests=boards.load("leaderboard").contests[:1])
    fewest, most = board.rules.seeds

    def metric(spec):
        if spec.method == "dp-lora":
            return 0.6 + 0.1 * (-1) ** spec.seed + wobble(spec)  # never settled
        return 0.6 + 0.2 * (spec.method == "rmt") + wobble(spec, 0.002)

    made = finished(board, metric)
    tests = Counter(s.method for s in made.made if s.split == "test")
    assert tests["dp-lora"] == tests["dp-adam"] == most and tests["non-private"] == tests["noise-only"] == fewest
    assert fewest <= tests["rmt"] < most
    found = {one.arm.name: one.verdict for one in state.standings(board.contests[0], board.rules, made.look)}
    assert found["rmt"].verdict == "better" and found["dp-lora"].verdict == "undecided"
    assert found["dp-adam"] is None and found["noise-only"] is None
    assert state.wanted(board, made.look) == [], "a finished leaderboard adds nothing"


def test_what_is_wanted_does_not_depend_on_who_made_the_records_and_when():
    made, half = finished(TINY, quality), Outcomes(quality)
    todo = state.wanted(TINY, half.look)
    half.make(todo[::2])
    again = state.wanted(TINY, half.look)
    assert {s.run_id for s in again} == {s.run_id for s in todo} - half.keys()
    while specs := state.wanted(TINY, half.look):
        half.make(specs[-1:])
    assert half.keys() == made.keys()


def test_spaces_are_equally_wide_and_points_are_the_same_for_all():
    places = set()
    for name in registry.methods():
        searched = space.space(name)
        low, high = searched["lr"]
        assert high / low == pytest.approx(space.WIDTH**2)
        first, *others = space.points(name, 5)
        assert first == {} and all(low * 0.95 <= p["lr"] <= high * 1.05 for p in others)
        places.add(tuple(round(math.log(p["lr"] / low) / math.log(high / low), 2) for p in others))
    spread = [max(column) - min(column) for column in zip(*places, strict=True)]
    assert max(spread) < 0.03, "rounded to two digits"
    assert space.points("dp-adam", 1) == [{}]


def test_an_arm_says_about_which_rate_to_search():
    first, *others = space.points("dp-adam", 6, 0.015)
    assert first == {} and all(0.0015 * 0.95 <= p["lr"] <= 0.15 * 1.05 for p in others)
    arm = next(a for a in boards.load("vision").contests[0].arms if a.name == "dp-adam")
    assert arm.points() == [first, *others] and arm.tested({}, 0).lr == 0.015


def test_the_answer_is_a_sentence_that_follows_from_the_records():
    made = finished(TINY, lambda spec: 0.9 if spec.method == "non-private" else quality(spec))
    text = markdown(verdicts.parts(TINY, made.look))
    assert "**rmt** leads" in text and "all others are worse" in text and "non-private 0.900" in text
    assert "**better**" in text and "1 of 1 verdicts are in" in text
    (short,) = verdicts.answers(TINY, made.look)
    assert short.startswith("- **low-rank") and "**rmt** leads" in short and "seeds." in short and "\n" not in short
    level = markdown(verdicts.parts(TINY, finished(TINY, lambda spec: 0.6 + wobble(spec)).look))
    assert "not shown to be worse" in level and "the same within 0.02" in level
    assert "Nothing has been tested yet" in markdown(verdicts.parts(TINY, Outcomes(quality).look))


def test_the_page_of_its_runs_answers_like_the_board_and_other_runs_belong_to_none():
    from dpft.harness.report.page import answers

    made = finished(TINY, quality)
    records = {run_id: {**record, "run_id": run_id} for run_id, record in made.items()}
    found, decided = answers.of_boards(records)
    (contest,) = TINY.contests
    standings = state.standings(contest, RULES, made.look)
    text = verdicts.answer(contest, RULES, standings)
    assert found == [{"title": f"Leaderboard tiny: {contest.title}", "lines": [{"budget": None, "text": text}]}]
    assert "**rmt** leads" in text and decided.keys() == {s.run_id for s in made.made if s.split == "test"}
    (rmt,) = (one for one in standings if one.arm.name == "rmt")
    assert all("better" in decided[rmt.arm.tested(rmt.tuning.chosen, seed).run_id] for seed in rmt.records)
    other = finished(boards.load("tiny", {"steps": 5}), quality)
    assert answers.of_boards({run_id: {**record, "run_id": run_id} for run_id, record in other.items()}) == ([], {})


def test_lower_is_better_where_the_metric_says_so():
    made = finished(TINY, quality)
    for record in made.values():
        record["result"] = {**record["result"], "higher_is_better": False}
    found = {one.arm.name: one for one in state.standings(TINY.contests[0], RULES, made.look)}
    if found["rmt"].verdict is not None:
        assert found["rmt"].verdict.difference < 0
    assert state.final(next(iter(made.values()))) < 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boards.load("tinny"), "did you mean 'tiny'"),
        (lambda: boards.load("tiny", {"seed": 3}), "its own seeds and halves; leave out seed"),
        (lambda: boards.load("tiny", {"split": "test"}), "leave out split"),
        (
            lambda: state.wanted(boards.load("tiny", {"epsilon": -1.0}), lambda spec: None),
            "epsilon must be more than 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call, message):
    with pytest.raises(BadInput, match=message):
        call()


BASE = 'contests = [{ base = { task = "low-rank" }, arms = [{ method = "dp-adam" }] }]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = { trails = 3 }", "x.rules has 'trails', which nobody knows; mend it"),
        ("rules = { seeds = [1, 0] }", r"x.rules.seeds\[0\] must be at least 2, not 1"),
        ("rules = { seeds = [4, 3] }", "more fewest than most seeds"),
        ("rules = { margin = 0.0 }", "x.rules.margin must be more than 0"),
        ("rules = { block = true }", "x.rules.block must be a whole number"),
        ("contests = []", "x.contests must have at least 1 entries"),
        ("contests = [{ base = {}, arms = [{ method = 'dp-adam' }] }]", "no one task in its `base`"),
        (
            "contests = [{ base = { task = 'low-rank' }, arms = [{ lr = 1.0 }] }]",
            "An arm of leaderboard x .* lacks method",
        ),
        (
            "contests = [{ base = { task = 'low-rank', lr = [] }, arms = [{ method = 'dp-adam' }] }]",
            "grid of lr is empty",
        ),
        ("contests = 3", "x.contests must be a list, not 3"),
    ],
)
def test_a_file_with_a_wrong_entry_is_refused_in_a_sentence(text, message, tmp_path, monkeypatch):
    path = tmp_path / "boards.toml"
    path.write_text("[x]\n" + "\n".join(line for line in (text, BASE) if line.split()[0] not in text or line is text))
    monkeypatch.setattr(boards, "FILE", path)
    boards.boards.cache_clear()
    try:
        with pytest.raises(BadInput, match=message):
            boards.load("x")
    finally:
        boards.boards.cache_clear()


def test_the_time_is_up_between_runs():
    made, asked = Outcomes(quality), iter([False, True])

    class Folder:
        def summary(self, run_id):
            record = made.get(run_id)
            return None if record is None else {"run_id": run_id, **record}

    assert driver.run(TINY, driver.looking(Folder()), lambda specs: made.make(specs[:1]), lambda: next(asked)) is False
    assert len(made.made) == 1
    assert driver.run(TINY, driver.looking(Folder()), made.make, lambda: False) is True


def test_advice_is_of_the_nearest_contest_says_how_it_differs_and_prints_a_command_that_runs():
    from dpft.harness.leaderboard import advice

    board = boards.load("leaderboard", {"epsilon": [8.0, 3.0]})
    made = finished(
        board, lambda spec: 0.7 + 0.1 * (spec.method == "prism") + 0.01 * (spec.epsilon or 9) + wobble(spec)
    )
    found = advice.advise(board, made.look, advice.Question("sentences", epsilon=7.0))
    assert found.contest.title == "sentences epsilon 8" and found.apart == ["its epsilon is 8"]
    assert [one.arm.name for one in found.level] == ["prism"] and found.plain.arm.name == "non-private"
    near = advice.advise(board, made.look, advice.Question("sst2", "roberta-base", 67349, 3.0))
    assert near.contest.title == "sentences epsilon 3"
    assert near.apart[:2] == ["it is of task sentences", "its model is minilm-l6"]
    line = advice.command(near.level[0], advice.Question("sst2", "roberta-base", 67349, 3.0))
    assert (
        "--task sst2" in line and "--model roberta-base" in line and "--method prism" in line and "--epsilon 3" in line
    )
    assert "--set schedule=linear" in line and "eval_every" not in line and "seed" not in line and "split" not in line
    for question, message in (
        (advice.Question("digits"), "No records are about"),
        (advice.Question("sentences", epsilon=100.0), "within a factor of 4 of epsilon 100"),
        (advice.Question("sentenses"), "did you mean 'sentences'"),
    ):
        with pytest.raises(BadInput, match=message):
            advice.advise(board, made.look, question)
    with pytest.raises(BadInput, match="make some with `dpft run leaderboard`"):
        advice.advise(board, Outcomes(quality).look, advice.Question("sentences"))


def test_the_command_advises_from_records_and_holds_a_memory_limit(tmp_path, monkeypatch, dpft):
    board = dataclasses.replace(boards.load("leaderboard"), contests=boards.load("leaderboard").contests[:1])
    made = finished(board, lambda spec: 0.7 + 0.2 * (spec.method in ("dp-adam", "last-layer")) + wobble(spec))
    monkeypatch.setattr(driver, "looking", lambda store: made.look)
    monkeypatch.setattr(boards, "load", lambda name: board)
    code, out, _ = dpft("advise", "--task", "sentences")
    assert code == 0 and "just what was asked" in out and "dpft run --task sentences" in out and "leads" in out
    code, out, err = dpft("advise", "--task", "sentences", "--memory", "200MiB")
    assert code == 0 and "--method last-layer" in out and "it fits" in out
    code, _, err = dpft("advise", "--task", "sentences", "--memory", "1MiB")
    assert code == 2 and "known to fit into 1MiB" in err

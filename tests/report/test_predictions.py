"""Predictions: what interval holds, fails or decides nothing; and the one table of all methods."""

import msgspec
import pytest
from report_cases import changed, records, store_of

from dpft.harness import report
from dpft.harness.errors import BadInput
from dpft.harness.report import predictions
from dpft.harness.report.predictions import Prediction, answered, decided
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve

ABOUT = Prediction("rmt is no worse", "x", {"method": "rmt"}, [{"method": "dp-adam"}], "not worse", 0.01)


def of(**more):
    return msgspec.structs.replace(ABOUT, **more)


def made(folder, chosen):
    store = store_of(folder, chosen)
    return report.Report(report.summaries(store), store, report.Options())


def with_finals(finals):
    """method -> final metric by seed, on real records of one setting."""
    chosen = records(task="sentences", lr=1e-4)
    return [
        changed(r, final=finals[r["spec"]["method"]][r["spec"]["seed"]])
        for r in chosen
        if r["spec"]["method"] in finals
    ]


@pytest.mark.parametrize(
    ("expect", "pairs", "verdict"),
    [
        ("not worse", [0.0, 0.001, -0.001], "held"),
        ("not worse", [-0.05, -0.051, -0.049], "failed"),
        ("not worse", [0.0, 0.05, -0.05], "undecided"),
        ("better", [0.05, 0.051, 0.049], "held"),
        ("better", [0.001, 0.0, -0.001], "failed"),
        ("worse", [-0.05, -0.051, -0.049], "held"),
        ("not better", [0.05, 0.051, 0.049], "failed"),
        ("same", [0.0, 0.001, -0.001], "held"),
        ("same", [0.05, 0.051, 0.049], "failed"),
        ("same", [-0.05, -0.051, -0.049], "failed"),
        ("same", [0.01, 0.011, 0.009], "undecided"),
        ("better", [0.05, 0.05], "undecided"),  # equal by chance: the interval of two would be a point
        ("better", [0.5], "undecided"),
        ("better", [], "undecided"),
    ],
)
def test_verdicts(expect, pairs, verdict):
    assert decided(of(expect=expect), pairs).verdict == verdict


def test_the_interval_is_students():
    found = decided(ABOUT, [0.0, 0.01, 0.02])
    assert found.difference == pytest.approx(0.01) and found.seeds == 3
    assert found.high - found.difference == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)


def test_a_prediction_is_answered_by_paired_seeds_of_the_better_of_its_rivals(tmp_path):
    finals = {"rmt": [0.70, 0.72, 0.74], "dp-adam": [0.70, 0.719, 0.741], "rmt-momentum": [0.5, 0.5, 0.5]}
    (group,) = made(tmp_path, with_finals(finals)).groups
    found = answered(of(against=[{"method": "rmt-momentum"}, {"method": "dp-adam"}]), group)
    assert found.against == "dp-adam" and found.verdict == "held" and abs(found.difference) < 1e-9
    assert answered(of(against=[{"method": "sparta"}]), group) is None
    assert answered(of(row={"method": "rmt", "clipping": "quantile"}), group) is None


def test_time_and_memory_are_ratios(tmp_path):
    chosen = with_finals({"rmt": [0.7, 0.7, 0.7], "dp-adam": [0.7, 0.7, 0.7]})
    for record in chosen:
        record["cost"]["step_cpu_s"] = (
            3.0 if record["spec"]["method"] == "rmt" else 1.0 + 0.001 * record["spec"]["seed"]
        )
    (group,) = made(tmp_path, chosen).groups
    assert answered(of(measure="time", ratio=3.0, expect="same"), group).verdict == "held"
    assert answered(of(measure="time", ratio=10.0, expect="not worse"), group).verdict == "failed"


def test_the_file_names_what_there_is():
    found = predictions.predictions()
    assert len(found) > 1
    for one in found:
        for settings in (one.row, *one.against):
            resolve({"task": "sentences", "model": "minilm-l6", **settings})  # raises for unknown names
        assert one.source and one.says[0].isupper() and not one.says.endswith(".")


def test_a_prediction_is_about_its_task_alone(tmp_path):
    finals = {"rmt": [0.70, 0.72, 0.74], "dp-adam": [0.70, 0.719, 0.741]}
    (group,) = made(tmp_path, with_finals(finals)).groups
    assert answered(ABOUT, group) is not None and answered(of(task="clicks"), group) is None


@pytest.mark.parametrize("both", [("--methods", "--theory"), ("--theory", "--predictions")])
def test_two_reports_at_once_are_refused(both, dpft, tmp_path):
    store_of(tmp_path, with_finals({"rmt": [0.7] * 3}))
    code, _, err = dpft("report", tmp_path, *both)
    assert code == 2 and "leave out" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('expect = "bigger"', r"prediction\[0\].expect must be one of those there are, not 'bigger'"),
        ("margin = 0.0", r"prediction\[0\].margin must be more than 0, not 0.0"),
        ("margin = nan", r"prediction\[0\].margin must be a finite number, not nan"),
        ('colour = "red"', r"prediction\[0\] has 'colour', which nobody knows"),
        ("ratio = true", r"prediction\[0\].ratio must be a number, not True"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, monkeypatch, line, words):
    good = 'says = "A"\nsource = "x"\nrow = { method = "rmt" }\nagainst = [{ method = "dp-adam" }]\n'
    other = "" if line.startswith("expect") else 'expect = "same"\n'
    other += "" if line.startswith("margin") else "margin = 0.01\n"
    (tmp_path / "predictions.toml").write_text(f"[[prediction]]\n{good}{other}{line}\n")
    monkeypatch.setattr(predictions, "FILE", tmp_path / "predictions.toml")
    with pytest.raises(BadInput, match=f"predictions.toml cannot be used: {words}; mend it"):
        predictions.predictions.__wrapped__()


def test_the_command_prints_them(tmp_path, dpft):
    store_of(tmp_path, with_finals({"dp-grape": [0.7] * 3, "dp-adam": [0.7] * 3}))
    code, out, _ = dpft("report", tmp_path, "--predictions")
    assert code == 0 and "Of 1 predictions 1 held, 0 failed and 0 are undecided" in out
    assert "+0.000 (+0.000 to +0.000) beside dp-adam, 3 seeds" in out


def test_one_line_a_method_with_costs_beside_the_baseline(tmp_path, dpft):
    chosen = with_finals({"rmt": [0.70, 0.72, 0.74], "dp-adam": [0.70, 0.719, 0.741]})
    for record in chosen:
        record["cost"]["step_cpu_s"] = 3.0 if record["spec"]["method"] == "rmt" else 2.0
    store_of(tmp_path, chosen)
    code, out, _ = dpft("report", tmp_path, "--methods")
    (line,) = [line for line in out.splitlines() if line.startswith("|") and "[rmt](" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert code == 0 and "1.50" in cells and "gradient" in cells and registry.method("rmt").summary in cells
    missing = out.split("Without a run here: ")[1]
    assert "dp-lora" in missing and " rmt," not in missing and "dp-adam," not in missing

"""The command line as a stranger meets it: tables, JSON, bad input, failures, interrupts."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Process

from dpft.harness.records.store import Store

ROOT = Path(__file__).parents[2]
DIVERGING = ["--lr", "1e6", "--set", "optimizer=adamw", "--set", "weight_decay=1e6"]  # weights grow 10^12-fold a step
SMALL = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=32"]


@pytest.fixture
def small(tiny_bert, mirror, tmp_path):
    """Arguments of a run of seconds; the results folder is `small.results`."""

    class Small(list):
        results = tmp_path / "runs"

    return Small(["--task", "sst2", "--model", tiny_bert, "--data-dir", mirror, "--results", Small.results, *SMALL])


@pytest.mark.usefixtures("noise_cache")
def test_noise_says_what_mechanisms_need_and_what_a_published_one_leaks(dpft):
    code, out, err = dpft("noise", "--epsilon", "3", "--dimension", "50", "--json")
    assert code == 0, err
    rows = {row["mechanism"]: row["over Gaussian, d = 50"] for row in json.loads(out)}
    assert rows["gaussian"] == 1 and min(rows.values()) == 1
    assert rows["laplace, coordinates"] == pytest.approx(1.7725, abs=1e-3) and rows["lmo, published law"] > 3
    code, out, err = dpft("noise", "--published", "0.4*gamma(2,1)+0.1*exponential(5)", "--json")
    assert code == 0 and json.loads(out)[1]["epsilon"] > json.loads(out)[0]["epsilon"]
    for bad, words in (("gamma(3)", "takes 2 numbers"), ("exponential(1)", "infinite variance")):
        code, out, err = dpft("noise", "--published", bad)
        assert code == 2 and words in one_sentence(err)
    code, out, err = dpft("noise", "--batch-size", "9", "--examples", "8")
    assert code == 2 and "larger than the 8 examples" in one_sentence(err)


def one_sentence(err):
    lines = [line for line in err.splitlines() if line.startswith(("dpft:", "Error:"))]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_run_prints_a_table_and_run_again_only_prints_it(dpft, small):
    code, out, err = dpft("run", *small, "--method", "dp-adam,noise-only,non-private")
    assert code == 0, err
    assert "step 4/4" in err and "epsilon spent" in err
    assert out.count("\n|") == 5 and "Not ranked" not in out
    row = next(line for line in out.splitlines() if "dp-adam" in line)
    assert re.match(r"\|\s+1 \|", row), "the one method that competes is first"
    again = dpft("run", *small, "--method", "dp-adam,noise-only,non-private")
    assert again == (0, out, "")
    assert dpft("report", small.results) == (0, out, "")


def test_json_is_one_document_and_nothing_else(dpft, small):
    code, out, _ = dpft("run", *small, "--method", "last-layer", "--json")
    records = json.loads(out)
    assert code == 0 and [r["status"] for r in records] == ["done"]
    for arguments in (
        ["list", "methods"],
        ["list", "tasks"],
        ["list", "suites"],
        ["describe", "dp-lora"],
        ["describe", "demo"],
    ):
        assert json.loads(dpft(*arguments, "--json")[1])
    rows = json.loads(dpft("plan", *small, "--method", "last-layer,dp-adam", "--json")[1])
    assert [row["state"] for row in rows] == ["done", "missing"]
    assert rows[0]["epsilon"] <= 3 and rows[0]["sigma"] == rows[1]["sigma"] and rows[0]["seconds"] is not None


def test_verify_finds_a_changed_noise_multiplier(dpft, small):
    dpft("run", *small, "--method", "last-layer", "--quiet")
    assert dpft("verify", small.results)[0] == 0
    path = next(small.results.glob("*.json"))
    record = json.loads(path.read_text())
    record["privacy"]["noise_multiplier"] *= 1.1
    path.write_text(json.dumps(record))
    code, out, _ = dpft("verify", small.results)
    assert code == 1 and path.stem in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "dp-adan"], "did you mean 'dp-adam'"),
        (["--method", "dp-adam", "--task", "sst-2"], "did you mean 'sst2'"),
        (["--method", "dp-adam", "--engine", "factord"], "did you mean 'factored'"),
        (["--method", "dp-adam", "--set", "stepz=3"], "did you mean 'steps'"),
        (["--method", "dp-adam", "--lr", "fast"], "not a number"),
        (["--method", "dp-adam", "--epsilon", "1e-9"], "epsilon"),
        (["--method", "dp-adam", "--epsilon", "30"], "epsilon"),
        (["--method", "dp-adam", "--batch-size", "601"], "larger than the 600 training examples"),
        (["--method", "dp-adam", "--delta", "0.5"], "protects nobody"),
        (["--method", "dp-adam", "--data-dir", "/nowhere"], "/nowhere"),
        (["--method", "dp-adam", "--model", "no-such-model"], "no-such-model"),
        (["--method", "dp-adam", "--results", "/dev/null/runs"], "choose --results"),
        (["--method", "dp-adam", "--device", "cuda:7"], "cuda:7"),
        (["--method", "dp-adam", "--shard", "3/2"], "--shard"),
        (["--method", "dp-lora", "--set", "targets=nothing"], "nothing"),
        (["--method", "non-private", *DIVERGING], "not finite"),
        (["--method", "non-private", "--lr", "1e30"], "lr must be at most 1000000, not 1e+30"),
        (["--method", "non-private", "--lr", "nan"], "not a finite number"),
        (["--method", "non-private", "--checkpoint-every", "inf"], "is not a number in the range"),
        (["--method", "non-private", "--timeout", "NaN"], "not a finite number"),
        (["--method", "non-private", "--seeds", str(2**64)], "not a whole number from 0"),
        (["--method", "non-private", "--set", "momentum=5"], "momentum must be less than 1, not 5"),
        (["--method", "non-private", "--set", "lr=[]"], "The grid of lr is empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(dpft, small, more, message):
    code, out, err = dpft("run", *small, *more)
    assert code == 2 and out == ""
    assert message in one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Name a suite"),
        (["run", "dmo"], "did you mean 'demo'"),
        (["run", "missing.toml"], "does not exist; give a TOML file"),
        (["plan", "dmo"], "did you mean"),
        (["describe", "dp-adm"], "did you mean"),
        (["report", "/nowhere"], "no results folder"),
        (["verify", "/nowhere"], "no results folder"),
        (["--plugin", "/nowhere.py", "list", "tasks"], "no plug-in file"),
        (["lst"], "No such command"),
    ],
)
def test_bad_questions(dpft, arguments, message):
    code, _, err = dpft(*arguments)
    assert code == 2 and message in one_sentence(err)


def test_a_damaged_record_is_named_and_nothing_is_lost(dpft, small):
    dpft("run", *small, "--method", "last-layer", "--quiet")
    path = next(small.results.glob("*.json"))
    path.write_text(path.read_text()[:100])
    before = sorted(p.name for p in small.results.iterdir())
    for command in (["run", *small, "--method", "last-layer"], ["report", small.results]):
        code, _, err = dpft(*command)
        assert code == 2 and str(path) in one_sentence(err)
    assert sorted(p.name for p in small.results.iterdir()) == before


def test_a_failing_run_is_a_record_and_the_others_go_on(dpft, small, tmp_path):
    suite = tmp_path / "mixed.toml"
    suite.write_text(
        '[mixed]\n[[mixed.arms]]\nmethod="non-private"\nlr=1e6\noptimizer="adamw"\nweight_decay=1e6\n[[mixed.arms]]\nmethod="last-layer"\n'
    )
    code, out, err = dpft("run", suite, *small)
    assert code == 1 and "1 of 2 runs failed" in err
    assert "last-layer" in out and "**diverged**" in out and "not finite" in out
    assert sorted(r["status"] for r in Store(small.results).records()) == ["diverged", "done"]
    _, _, err = dpft("run", suite, *small)
    assert "[1/" not in err, "a failed run is made again only when asked"
    _, _, err = dpft("run", suite, *small, "--retry-failed")
    assert "[1/1]" in err


def test_unmatched_budgets_are_not_ranked(dpft, small):
    dpft("run", *small, "--method", "last-layer", "--quiet")
    code, _, err = dpft("run", *small, "--method", "dp-adam", "--quiet", "--batch-size", "30")
    assert code == 0, err
    _, out, _ = dpft("report", small.results)
    assert "**Not ranked**" in out and not re.search(r"\n\|\s+1 \|", out)


def test_report_writes_between_markers_and_check_tells_stale(dpft, small, tmp_path):
    dpft("run", *small, "--method", "last-layer", "--quiet")
    page = tmp_path / "RESULTS.md"
    code, _, err = dpft("report", small.results, "-o", page)
    assert code == 2 and "does not exist; make it with the lines" in err
    page.write_text("no markers")
    assert "lacks the lines" in dpft("report", small.results, "-o", page)[2]
    page.write_text("before\n<!-- dpft report: begin -->\nold\n<!-- dpft report: end -->\nafter\n")
    assert dpft("report", small.results, "-o", page, "--check")[0] == 1 and "old" in page.read_text()
    assert dpft("report", small.results, "-o", page)[0] == 0
    assert (
        page.read_text().startswith("before\n")
        and page.read_text().endswith("after\n")
        and "last-layer" in page.read_text()
    )
    assert dpft("report", small.results, "-o", page, "--check")[0] == 0


def test_timeout_is_a_status(dpft, small):
    code, _, err = dpft("run", *small, "--method", "last-layer", "--timeout", "0.001")
    assert code == 2 and "time limit" in err
    assert Store(small.results).records()[0]["status"] == "timeout"
    assert list(small.results.glob("*.ckpt")), "the next try goes on where the time was up"
    assert dpft("run", *small, "--method", "last-layer", "--quiet")[0] == 0
    assert not list(small.results.glob("*.ckpt"))


def test_shards_cover_the_suite_once(dpft, small):
    methods = "last-layer,dp-adam,dp-lora"
    for part in ("1/2", "2/2"):
        assert dpft("run", *small, "--method", methods, "--shard", part, "--quiet")[0] == 0
    _, _, err = dpft("run", *small, "--method", methods)
    assert err == "" and len(Store(small.results).records()) == 3


def outcomes(folder):
    records = Store(folder).records()
    curves = [Store(folder).curve(r["run_id"]).to_dicts() for r in records]
    return [{key: r[key] for key in ("status", "spec", "privacy", "result", "diagnostics")} for r in records], curves


@pytest.mark.slow
def test_kill_at_any_moment_then_run_again_gives_the_same_records(dpft, small, tmp_path):
    """kill -9 at three moments of three runs; what is finished stays, nothing is half-written, the end is the same."""
    command = ["run", *small, "--method", "dp-adam,dp-lora,last-layer", "--steps", "12", "--checkpoint-every", "0"]
    assert dpft(*command, "--results", tmp_path / "whole", "--quiet")[0] == 0
    for lines, pause in ((4, 0.0), (9, 0.02), (6, 0.05)):  # of some 8 a run: in the first, the second and the third
        process = Process(*command)
        for _ in range(lines):
            process.stderr.readline()
        time.sleep(pause)
        process.kill()
        process.communicate()
        Store(small.results).records()  # every file that is there can be read
    code, _, err = dpft(*command)
    assert code == 0 and "step 12/12" in err, "something must be left to do, or nothing was killed"
    assert outcomes(small.results) == outcomes(tmp_path / "whole")
    assert not list(small.results.glob("*.ckpt")) and not list(small.results.glob(".*.tmp"))


@pytest.mark.slow
def test_interrupt_is_exit_code_130_without_a_traceback(small):
    process = Process("run", *small, "--method", "dp-adam", "--steps", "200")
    for line in process.stderr:
        if "step 2/" in line:
            break
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait() == 130 and "interrupted" in err and "Traceback" not in err


@pytest.mark.slow
def test_two_processes_at_once_share_the_work(small):
    command = ["run", *small, "--method", "dp-adam,dp-lora,last-layer"]
    both = [Process(*command) for _ in range(2)]
    (out1, err1), (out2, err2) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0], err1 + err2
    assert out1 == out2
    assert (err1 + err2).count("done:") == 3, "each run is made once"


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv=['dpft','--help']\nfrom dpft.harness import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch','transformers','polars','datasets','numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"

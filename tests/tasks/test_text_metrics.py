"""Metrics of generated texts beside the libraries' own commands."""

import csv
import json
import math
import subprocess
import sys

import pytest

from dpft.tasks import metrics

PREDICTIONS = [
    "Blue Spice is a pub.",
    "The Cotto, a cheap coffee shop, is near Cotto.",
    "a",
    "Running pubs served food",
]
REFERENCES = [
    ["Blue Spice is a pub.", "A pub is Blue Spice."],
    ["Cotto is a cheap coffee shop.", "Near Cotto there is the cheap coffee shop The Cotto.", "Cotto: cheap coffee"],
    ["a the in", "in the city"],
    ["Runs a pub which serves foods", "The pub serves food"],
]


def test_bleu_equals_sacrebleu_s_command(tmp_path):
    (tmp_path / "hypotheses").write_text("\n".join(PREDICTIONS) + "\n")
    paths = []
    for i in range(
        3
    ):  # a reference twice changes nothing; an empty line would be a reference of no words to the command
        paths.append(tmp_path / f"references-{i}")
        paths[-1].write_text("\n".join(texts[min(i, len(texts) - 1)] for texts in REFERENCES) + "\n")
    command = [sys.executable, "-m", "sacrebleu", *map(str, paths), "-i", str(tmp_path / "hypotheses"), "-w", "10"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    metric = metrics.make_text()
    found = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found["bleu"] == pytest.approx(report["score"], abs=1e-9) and 0 < found["bleu"] < 100
    signature = report["signature"].replace("nrefs:3", "nrefs:var")
    assert metric.definitions["bleu"] == f"sacrebleu {signature}" and "tok:13a" in signature


def test_rouge_l_equals_rouge_score_s_command(tmp_path):
    """The command knows one reference a text: the better of its scores of each is what several references give."""
    scores = []
    for column in range(2):
        (tmp_path / "targets").write_text("\n".join(texts[column] for texts in REFERENCES) + "\n")
        (tmp_path / "predictions").write_text("\n".join(PREDICTIONS) + "\n")
        command = [sys.executable, "-m", "rouge_score.rouge", "--rouge_types=rougeL", "--use_stemmer=true"]
        command += [f"--{name}_filepattern={tmp_path}/{name}s" for name in ("target", "prediction")]
        command += ["--aggregate=false", f"--output_filename={tmp_path}/scores.csv"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        with open(tmp_path / "scores.csv") as file:
            scores.append([float(row["rougeL-F"]) for row in csv.DictReader(file)])
    best = [max(pair) for pair in zip(*scores, strict=True)]
    two = [texts[:2] for texts in REFERENCES]
    found = metrics.make_text().compute(predictions=PREDICTIONS, references=two)
    assert found["rouge_l"] == pytest.approx(100 * sum(best) / len(best), abs=1e-4) and len(set(best)) > 2


def test_text_metrics_at_their_ends():
    same = metrics.make_text().compute(
        predictions=["Blue Spice is a pub ."] * 2, references=[["Blue Spice is a pub ."]] * 2
    )
    assert same["bleu"] == pytest.approx(100) and same["rouge_l"] == 100 and same["nist"] > 0
    none = metrics.make_text().compute(predictions=["", ""], references=[["Blue Spice is a pub ."]] * 2)
    assert none == {"bleu": 0.0, "rouge_l": 0.0, "nist": 0.0}


def test_perplexity_weighs_tokens_and_not_examples():
    found = metrics.make_perplexity().compute(predictions=[1.0, 9.0], references=[1, 4])
    assert found == {"loss_per_token": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert math.isfinite(metrics.make_perplexity().compute(predictions=[1e9], references=[1])["perplexity"])

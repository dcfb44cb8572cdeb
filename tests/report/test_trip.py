"""The picture of a batch's trip has the numbers of its run."""

import copy
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from dpft.harness.errors import BadInput
from dpft.harness.records.store import Store
from dpft.harness.report.trip import picture

ROOT = Path(__file__).resolve().parents[2]
DRAWN = "f1a5ff2f238f124a"


@pytest.fixture(scope="module")
def runs():
    return {record["run_id"]: record for record in Store(ROOT / "results/official").records()}


def words(record):
    return [element.text for element in xml.fromstring(picture(record)).iter() if element.tag.endswith("}text")]


def test_the_picture_of_the_documentation_is_that_of_its_run(runs):
    assert (ROOT / "docs/trip.svg").read_text(encoding="utf-8") == picture(runs[DRAWN])


def test_its_numbers_are_those_of_the_record(runs):
    told = " ".join(words(runs[DRAWN]))
    for number in ("18,348 examples", "256 expected", "0.0140", "770 numbers", "0.406 × 2", "ε ≤ 7.997", "0.774"):
        assert number in told
    plain = next(record for record in runs.values() if record["spec"]["method"] == "non-private")
    assert "none: a control" in words(plain) and not any("ε ≤" in word for word in words(plain))


def test_what_has_no_trip_is_told_and_names_are_escaped(runs):
    record = copy.deepcopy(runs[DRAWN])
    record["spec"]["model"] = "<b>&x"
    assert "<b>&x" in words(record)
    with pytest.raises(BadInput, match="did not finish"):
        picture({**record, "status": "error"})
    with pytest.raises(BadInput, match="has no cost"):
        picture({key: value for key, value in record.items() if key != "cost"})

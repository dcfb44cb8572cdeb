"""What comes from outside as typed values: what does not fit is named by its key, its value and what it must be."""

import os

import msgspec
import pytest

from dpft.harness.border import documents, files
from dpft.harness.border.documents import Misfit, fitted
from dpft.harness.border.values import Count, Name, Number, Step, one_line, shown
from dpft.harness.errors import BadInput


class Part(msgspec.Struct):
    step: Step | None
    name: Name


class Whole(msgspec.Struct, forbid_unknown_fields=True):
    parts: dict[str, Part]
    numbers: list[Number] = []
    size: Count = 0


GOOD = {"step": 1, "name": "a"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"parts": {"p": GOOD, "q": {**GOOD, "name": "a|b"}}},
            "parts.q.name must be a name of letters, digits and . _ + -",
        ),
        ({"parts": {"p": GOOD, "q": {**GOOD, "name": "a\n"}}}, "not 'a\\n'"),
        ({"parts": {"p": GOOD, "q": {**GOOD, "step": 0}}}, "parts.q.step must be at least 1, not 0"),
        ({"parts": {"p": GOOD, "q": {**GOOD, "step": "3"}}}, "parts.q.step must be a whole number or null, not '3'"),
        ({"parts": {"q": {"name": "a"}}}, "parts.q lacks step"),
        ({"parts": {}, "numbers": [1, float("nan")]}, "numbers[1] must be a finite number, not nan"),
        ({"parts": {}, "numbers": [float("inf")]}, "numbers[0] must be a finite number, not inf"),
        ({"parts": {}, "numbers": [True]}, "numbers[0] must be a number, not True"),
        ({"parts": {}, "numbers": [10**400]}, "numbers[0] is too large a number"),
        ({"parts": {}, "size": 10**16}, "size must be at most 1e+15"),
        ({"parts": {}, "colour": 1}, "has 'colour', which nobody knows"),
        ({"parts": {}, "a - at `$.b`": 1}, "is wrong ("),
        ({"parts": {}, "a\nb": 1}, "has 'a\\nb', which nobody knows"),
        ([], "must be a table, not []"),
        (None, "must be a table, not None"),
    ],
)
def test_a_misfit_has_its_key_and_its_value(value, said):
    with pytest.raises(Misfit) as problem:
        fitted(value, Whole)
    assert said in str(problem.value)


def test_a_mapping_is_as_before_after_its_wrong_entry_was_looked_for():
    value = {"parts": {"p": GOOD, "q": {**GOOD, "step": 0}, "r": GOOD}}
    with pytest.raises(Misfit, match="parts.q.step"):
        fitted(value, Whole)
    assert list(value["parts"]) == ["p", "q", "r"] and value["parts"]["r"] == GOOD


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "[1e999]", "[" * 9000, '{"a":', "", "1" * 5000, "\ud800"]
)
def test_json_that_is_none(text):
    with pytest.raises(ValueError):
        documents.parsed(text)


def test_json_keeps_every_number(tmp_path):
    assert documents.parsed("[0.1, 1e-320, 12345678901234567890, -0.0]") == [0.1, 1e-320, 12345678901234567890, -0.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a = 1\na = 2\n", "cannot be read"),
        (b"a = " + b"[" * 5000, "nested too deep"),
        (b"a = nan", "a must be a finite number"),
        (b"a = 1979-05-27", "a must be a number"),
        (b"\xff", "is no UTF-8 text (byte 0)"),
        (b"a = " + b"1" * 5000, "cannot be read"),
    ],
)
def test_toml_that_is_none(tmp_path, content, said):
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput) as problem:
        documents.from_toml(path, dict[str, Number], "The file", "mend it")
    assert said in str(problem.value) and str(path) in str(problem.value) and str(problem.value).endswith("; mend it.")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", files.LARGEST + 1)
    said = {
        "fifo": "is a FIFO, no regular file",
        "loop": "cannot be opened",
        "big": "more than 1,073,741,824 are never right",
        "none": "does not exist",
        ".": "is a folder",
        "/dev/zero": "is a device",
        "a\0": "cannot be opened",
    }
    for name, words in said.items():
        with pytest.raises(BadInput, match="^The file .*; mend it.$") as problem:
            files.content(tmp_path / name, "The file", "mend it")
        assert words in str(problem.value), name


def test_values_are_shown_on_one_line_and_cut():
    assert (
        shown("a\x1b[2J\n") == r"'a\x1b[2J\n'"
        and len(shown("x" * 1000)) == 60
        and shown(10**5000).startswith("a number")
    )
    assert one_line("a\nb\x1b[2J\u202e") == "a b\\x1b[2J\\u202e" and one_line("ε ≤ 8: “ä”") == "ε ≤ 8: “ä”"

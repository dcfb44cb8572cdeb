"""Columns as texts and as classes: every cell is checked, and complaints say where."""

import polars
import pytest

from dpft.harness.errors import BadInput, CannotRun
from dpft.tasks.own import columns, holdout, tabular


def table(**values):
    frame = polars.DataFrame({name: polars.Series(name, cells, strict=False) for name, cells in values.items()})
    return tabular.of_frame(frame, "rows.parquet")


def test_texts_are_rows_under_the_keys_that_are_asked():
    assert columns.texts(table(q=["a", "b"], a=["c", "42"]), {"prompt": "q", "response": "a"}) == [
        {"prompt": "a", "response": "c"},
        {"prompt": "b", "response": "42"},
    ]


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"texts": ["a"], "n": ["b"]}, "has no column text; it has texts, n: did you mean 'texts'"),
        ({f"c{i}": ["a"] for i in range(20)}, "c11 and 8 more: name one of them"),
        ({"text": []}, "has no rows"),
        ({"text": [1, 2]}, "The column text of rows.parquet holds numbers .row 1., not text"),
        ({"text": [["a"]]}, "holds lists .row 1., not text"),
        ({"text": ["a", None, " ", ""]}, "has 3 rows without text, the first in row 2"),
        ({"text": ["a", ""]}, "has a row without text, the first in row 2"),
        ({"text": ["12", "-3.5"]}, "holds numbers only .such as '12'., not text"),
    ],
)
def test_texts_that_are_none(values, complaint):
    with pytest.raises(CannotRun, match=complaint):
        columns.texts(table(**values), {"text": "text"}, words=("text",))


def test_half_a_character_is_refused():
    one = tabular.Table("rows.jsonl", ("text",), 1, lambda name: ["a \ud83d"], lambda i: f"line {i + 1}")
    with pytest.raises(CannotRun, match="half a character .line 1"):
        columns.texts(one, {"text": "text"})


@pytest.mark.parametrize(
    "values, expected",
    [
        (["b", " a ", "b"], ["b", "a", "b"]),
        (["1", "0.0", "10"], ["1", "0", "10"]),
        ([3, 1], ["3", "1"]),
        ([1.0, 2.0], ["1", "2"]),
        ([True, False], ["true", "false"]),
        (["1", "two"], ["1", "two"]),
        (["None", "NA"], ["None", "NA"]),
    ],
)
def test_classes_are_names_or_whole_numbers(values, expected):
    assert columns.classes(table(y=values), "y") == expected


@pytest.mark.parametrize(
    "values, complaint",
    [
        (["1", ".5"], "The column y of rows.parquet holds the number '.5' .row 2.; classes must be names or whole"),
        ([0.5, 1.0], "holds the number '0.5' .row 1."),
        (["inf", "1"], "holds the number 'inf'"),
        (["a", None], "has a row without y, the first in row 2"),
        ([1.0, float("nan")], "has a row without y, the first in row 2"),
        (["a", "NaN", ""], "has 2 rows without y, the first in row 2"),
    ],
)
def test_labels_that_are_none(values, complaint):
    with pytest.raises(CannotRun, match=complaint):
        columns.classes(table(y=values), "y")


def test_names_are_in_order_and_must_be_classes():
    assert columns.names(["10", "9", "-1"], "f") == ("-1", "9", "10")
    assert columns.names(["10", "9", "x"], "f") == ("10", "9", "x")
    for values, complaint in (
        (["a", "a"], "All labels of f are 'a'"),
        ([str(i) for i in range(30)], "30 different labels in 30 rows .such as '0'., which look like numbers or ids"),
        ([str(i % 1001) for i in range(9000)], "1001 different labels"),
    ):
        with pytest.raises(CannotRun, match=complaint):
            columns.names(values, "f")
    assert len(columns.names([str(i % 1000) for i in range(9000)], "f")) == 1000


def test_a_row_is_held_out_for_what_is_in_it_alone():
    keys = [f"text {i}".encode() for i in range(2000)]
    train, validation = holdout.held_out(keys, keys, 0.1, "f")
    assert 150 < len(validation) < 250 and sorted([*train, *validation]) == sorted(keys)
    _, turned = holdout.held_out(keys[::-1], keys[::-1], 0.1, "f")
    _, some = holdout.held_out(keys[::2], keys[::2], 0.1, "f")
    assert set(turned) == set(validation) and set(some) == set(validation) & set(keys[::2])
    _, more = holdout.held_out(keys, keys, 0.2, "f")
    assert set(validation) < set(more)
    assert holdout.shared([b"a", b"b"], [b"b", b"b", b"c"]) == 2
    with pytest.raises(CannotRun, match="validation=1e-09 holds out 0 of the 2 rows of f"):
        holdout.held_out([1, 2], [b"text 0", b"text 1"], 1e-9, "f")


def test_a_share_or_a_file():
    assert (holdout.fraction("0.25"), holdout.fraction("rows.csv")) == (0.25, None)
    for wrong in ("0", "1", "-0.5", "nan", "3"):
        with pytest.raises(BadInput, match="must be a share between 0 and 1, or a file"):
            holdout.fraction(wrong)

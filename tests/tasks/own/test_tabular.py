"""Tables of a user's own: every kind is read alike, and whatever is wrong with one is a sentence that says where."""

import gzip
import json
import os
from random import Random

import polars
import pytest

from dpft.harness.errors import CannotRun
from dpft.tasks.own import paths, tabular

ROWS = [("a, b", "1"), ('say "hi"\nagain', "2"), ("naïve – ☃", "3")]
CSV = 'text,n\n"a, b",1\n"say ""hi""\nagain",2\n\nnaïve – ☃,3\n'


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows):
    return "\n".join(json.dumps({"text": text, "n": n}) for text, n in rows)


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.csv", CSV),
        ("ROWS.CSV", "\ufeff" + CSV.replace("\n\n", "\n")),
        ("windows.csv", CSV.replace("\n", "\r\n").replace('hi""\r\n', 'hi""\n')),
        ("rows.tsv", 'text\tn\na, b\t1\n"say ""hi""\nagain"\t2\nnaïve – ☃\t3\n'),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("rows.jsonl", lines(ROWS) + "\n\n"),
        ("rows.ndjson", "\ufeff" + lines(ROWS)),
        ("rows.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
        ("rows.parquet", None),
    ],
)
def test_every_kind_is_read_alike(name, content, tmp_path):
    path = tmp_path / name
    if content is None:
        polars.DataFrame(ROWS, schema=["text", "n"], orient="row").write_parquet(path)
    else:
        write(path, content)
    table = tabular.read(path)
    assert (table.columns, table.size, table.where) == (("text", "n"), 3, str(path))
    assert list(zip(table.values("text"), table.values("n"), strict=True)) == ROWS


def test_places_are_lines_of_the_file(tmp_path):
    table = tabular.read(write(tmp_path / "rows.csv", CSV))
    assert [table.place(i) for i in range(3)] == ["line 2", "line 3", "line 6"]
    table = tabular.read(write(tmp_path / "rows.jsonl", lines(ROWS[:1]) + "\n\n" + lines(ROWS[1:])))
    assert [table.place(i) for i in range(3)] == ["line 1", "line 3", "line 4"]


def test_a_huge_cell_is_a_cell(tmp_path):
    text = "word " * 200_000
    assert tabular.read(write(tmp_path / "rows.csv", f"text,n\n{text},1\n")).values("text") == [text]


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("rows.txt", "text\na\n", "has none of the endings that are read, csv, tsv, jsonl"),
        ("rows.parquet.gz", "x", "has none of the endings"),
        ("rows.csv", "", "is empty"),
        ("rows.jsonl", " \n", "is empty"),
        ("rows.csv", "text,n\na,1\nb,2,3\n", "is ragged: its first line has 2 cells, line 3 has 3"),
        ("rows.csv", "text,n\na,1\nb\n", "is ragged: its first line has 2 cells, line 3 has 1"),
        ("rows.csv", 'text,n\n"a,1\nb,2\n', "unexpected end of data in the row that begins in line 2"),
        ("rows.csv", 'text,n\na,1\n"b" c,2\n', "in the row that begins in line 3; mend its quotes"),
        ("rows.csv", "text,n,text\na,1,b\n", "has two columns called 'text'"),
        (
            "rows.csv",
            "text\na\ncaf\xe9\n".encode("latin-1"),
            "not UTF-8 text .byte 0xe9 in line 3.*iconv -f WINDOWS-1252",
        ),
        ("rows.csv", "text\na\n".encode("utf-16"), "not UTF-8 text .*iconv -f UTF-16"),
        ("rows.csv.gz", b"text\n", "is not a readable gz file"),
        ("rows.csv.gz", gzip.compress(b"text\na\n" * 99, mtime=0)[:-9], "is not a readable gz file"),
        ("rows.jsonl", '{"text": "a"}\n{not json}\n', "not a readable jsonl file .line 2: "),
        ("rows.jsonl", '[{"text": "a"},\n{"text": "b"}]', "not a readable jsonl file .line 1: "),
        ("rows.jsonl", '"a"\n', "has no JSON object in line 1"),
        ("rows.parquet", b"PAR1 no", "is not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(name, content, complaint, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(CannotRun, match=complaint) as error:
        tabular.read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


def test_spoilt_bytes_are_a_table_or_a_sentence(tmp_path):
    """Whatever single bytes, quotes and breaks get lost or in between."""
    random, seeds = Random(0), {"rows.csv": CSV.encode(), "rows.jsonl": lines(ROWS).encode()}
    seeds["rows.csv.gz"] = gzip.compress(seeds["rows.csv"], mtime=0)
    extra, refused = [b'"', b",", b"\n", b"\r", b"\0", b"{", b"NaN", b"\xf0\x9f"], 0
    for _ in range(300):
        name, content = random.choice(list(seeds.items()))
        place = random.randrange(len(content))
        spoilt = content[:place] + random.choice(extra) + content[place + random.randrange(4) :]
        try:
            tabular.read(write(tmp_path / name, spoilt))
        except CannotRun as error:
            refused += 1
            assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error)
    assert 100 < refused < 300


def test_files_are_found_beside_the_user_then_in_the_mirror(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir(), (tmp_path / "mirror").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "mirror/rows.csv", "1")
    assert paths.file("rows.csv", tmp_path / "mirror").read_text() == "1"
    write(tmp_path / "here/rows.csv", "2")
    assert paths.file("rows.csv", tmp_path / "mirror").read_text() == "2"
    os.mkfifo("pipe.csv")
    for name, complaint in (
        ("pipe.csv", "is not a regular file"),
        ("../here", "is a folder, not a file"),
        ("rows.tsv", "rows.tsv does not exist"),
    ):
        with pytest.raises(CannotRun, match=complaint):
            paths.file(name, tmp_path / "mirror")
    for name, complaint in (("rows.csv", "is a file, not a folder"), ("nowhere", "nowhere does not exist")):
        with pytest.raises(CannotRun, match=complaint):
            paths.folder(name, None)


def test_content_is_that_of_the_bytes_and_not_of_the_place(tmp_path):
    import hashlib

    one, two = write(tmp_path / "one.csv", "a"), write(tmp_path / "two.csv", "b")
    assert paths.content({"file": one}) == hashlib.sha256(b"a").hexdigest()[:16]
    both = paths.content({"file": one, "validation": two})
    assert both == paths.content({"validation": two, "file": one.rename(tmp_path / "moved.csv")})
    assert both != paths.content({"file": two, "validation": tmp_path / "moved.csv"})
    write(two, "c")
    assert paths.content({"file": tmp_path / "moved.csv", "validation": two}) != both

"""Tables as wide as the terminal, tried in a real one of 80 columns."""

import os
import pty
import subprocess
import sys

from studies import ROOT

from dpft.harness.cli import showing
from dpft.harness.cli.showing import fitting
from dpft.harness.report.text import Table


def in_terminal(*words, columns=80):
    """What `dpft WORDS` prints in a terminal of so many columns."""
    leader, follower = pty.openpty()
    code = "import sys; from dpft.harness import cli; cli.main()"
    environment = os.environ | {"COLUMNS": str(columns)}
    command = [sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment):
        os.close(follower)
        found = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # its end, where nobody writes any more
                break
            found += piece
    os.close(leader)
    return found.decode().replace("\r\n", "\n")


def test_tables_of_a_report_fit_80_columns_and_say_what_they_leave_out():
    text = in_terminal("report", ROOT / "results/official", "--task", "sentences")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and max(map(len, rows)) <= 80
    assert "last-layer" in text and "In all rows: runs 1/1" in text and "Too wide for this terminal" in text
    assert "alignment" in text.partition("Too wide for this terminal")[2].partition("\n")[0]


def test_lists_are_wrapped():
    text = in_terminal("list", "methods")
    assert max(map(len, text.splitlines())) <= 80 and "dp-adafest" in text


def test_a_pipe_gets_everything(dpft):
    _, out, _ = dpft("report", ROOT / "results/official", "--task", "sentences")
    assert "alignment noisy / decoded" in out and "Too wide" not in out


def test_a_table_keeps_its_names_and_first_values():
    long = [
        {"method": name, "eps": "8", "metric": value, "long": "x" * 59 + name}
        for name, value in (("a", ".7"), ("b", ".8"))
    ]
    cells = [dict(line) for line in long]
    table, said = fitting(Table(cells), 40)
    assert table.cells == [{"method": "a", "metric": ".7"}, {"method": "b", "metric": ".8"}]
    assert said == "In all rows: eps 8. Too wide for this terminal: long; a pipe or a file has them."
    assert fitting(Table(cells), 400) == [Table(cells)] and fitting("text", 10) == ["text"]


def test_a_terminal_sees_how_far_reading_is_once_it_takes_long(monkeypatch, capsys):
    ids, clock = [str(i) for i in range(250)], iter(range(100))
    monkeypatch.setattr(showing.time, "monotonic", lambda: next(clock))
    assert list(showing.counted(ids)) == ids and capsys.readouterr().err == "", "a file is no terminal"
    monkeypatch.setattr(showing.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(showing.counted(ids)) == ids
    assert capsys.readouterr().err == "\r100 of 250 records read\r200 of 250 records read\r\033[K"

"""A short version of tests/kills.py, whose full table is in docs/faults.md."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_suite_that_is_killed_again_and_again_ends_as_an_undisturbed_one():
    script = Path(__file__).parents[1] / "kills.py"
    command = [sys.executable, script, "--kills", "3", "--terms", "2", "--seed", "7"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0 and "Nothing was lost, changed or left behind." in found.stdout, (
        found.stdout + found.stderr
    )
    assert "| signals, at random moments | 3 | 2 |" in found.stdout

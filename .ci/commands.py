#!/usr/bin/env python3
"""Run the dpft commands on stdin, one a line, two at a time; exit 1 where one fails. Each is forked from this process, which has
imported what all of them need: that takes longer than most of them."""

import os
import shlex
import sys

from dpft.harness import cli
from dpft.harness.leaderboard import driver  # noqa: F401
from dpft.harness.records import verifying  # noqa: F401
from dpft.harness.report import Report  # noqa: F401

TOGETHER = 2


def started(line: str) -> int:
    child = os.fork()
    if child:
        return child
    sys.argv = shlex.split(line)
    code = 70
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> int:
    lines, running, failed = [line.strip() for line in sys.stdin if line.strip()], {}, False
    while lines or running:
        while lines and len(running) < TOGETHER:
            line = lines.pop(0)
            running[started(line)] = line
        child, status = os.wait()
        line = running.pop(child)
        if code := os.waitstatus_to_exitcode(status):
            print(f"exit code {code}: {line}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

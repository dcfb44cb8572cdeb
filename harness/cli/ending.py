"""How a command ends: its exit code, and the one sentence on stderr where it did not end well."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import click

from dpft.harness.border.values import one_line
from dpft.harness.errors import BadInput, RankLost
from dpft.harness.execution import interrupts, jobs, launching
from dpft.harness.plugins import blame

BAD, CRASHED, CLOSED = 2, 70, 128 + signal.SIGPIPE


def ended(command: Callable[[], int | None]) -> int:
    """The exit code of `command()`: its own (0, or 1 where the answer is no), 2 for bad input and for what the system refused, 70
    for a fault of dpft, of which a report is written, 130 for SIGINT, 143 for SIGTERM, 141 where nobody reads on."""
    try:
        with interrupts.handled():
            return command() or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return BAD
    except click.Abort as stop:
        return _interrupted(stop.__cause__)  # click wraps it
    except click.ClickException as error:
        told = one_line(error.format_message()).rstrip(". ")
        context = getattr(error, "ctx", None)
        if context is not None and not isinstance(error, click.BadParameter):
            told += f"; `{context.command_path} -h` says what there is"
        return _say(f"{told}.", BAD)
    except BadInput as error:
        return _say(str(error), BAD)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _say(f"{error.strerror or error}{place}; finished runs are kept, mend it and run again.", BAD)
    except MemoryError:
        return _say("There is not enough memory; finished runs are kept, ask for less at once and run again.", BAD)
    except KeyboardInterrupt as stop:
        return _interrupted(stop)
    except RankLost as error:
        return (
            launching.LOST
            if launching.led()
            else _say(f"{error}; finished runs are kept, the same command continues.", BAD)
        )
    except SystemExit as error:
        if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # so click ends where nobody reads on (`| head`)
            return CLOSED
        told = blame.told(error)
        return _say(
            told or f"{_place(error)} ends the program with sys.exit, which nothing may here; take that out.", BAD
        )
    except BaseException as error:
        if sentence := blame.told(error):  # not a fault of dpft
            if os.environ.get("DPFT_DEBUG"):
                traceback.print_exception(error)
            return _say(sentence, BAD)
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":  # a panic of polars
            raise
        return _crashed(error)


def _interrupted(stop: BaseException | None) -> int:
    if not (jobs.is_sibling() or launching.led()):  # its parent says it
        _say("interrupted; finished runs are kept, the same command continues.", BAD)
    return launching.code_of(stop)


def _say(text: str, code: int) -> int:
    if launching.silent() and code != CRASHED:
        return code
    text = re.sub(r"\S{300,}", lambda word: f"{word[0][:60]}...", one_line(text))
    click.echo(f"dpft: {text}" + ("" if text.endswith((".", ".)", "?")) else "."), err=True)
    return code


def _crashed(error: BaseException) -> int:
    if os.environ.get("DPFT_DEBUG"):
        traceback.print_exception(error)
    told = f"This is a fault of dpft, not of what you asked ({type(error).__name__} in {_place(error)}); finished runs are kept"
    path = written(error)
    what = "run it again with --debug" if path is None else f"please report it with the file {path}"
    return _say(f"{told}, {what}.", CRASHED)


def _place(error: BaseException) -> str:
    """The innermost line of a traceback that is no library's, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown place"


def written(error: BaseException) -> Path | None:
    """A bug report in the current folder, else in that for temporary files; None where neither can be written.

    The traceback without the errors' own words, which may quote a row of the data; --debug prints those.
    """
    import platform
    import tempfile
    from datetime import UTC, datetime
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} is not installed"

    packages = ", ".join(
        map(installed, ("dpft", "torch", "transformers", "peft", "opacus", "polars", "numpy", "click"))
    )
    lines = [
        f"command: {' '.join(map(repr, sys.argv[1:]))}",
        f"python {platform.python_version()} on {platform.platform()}; {packages}",
        *_told(error),
    ]
    name = f"dpft-fault-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (lambda: Path(), lambda: Path(tempfile.gettempdir())):
        try:
            path = folder() / name
            path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return path
    return None


def _told(error: BaseException | None) -> list[str]:
    """Types and places of an error and of those behind it, the first cause last."""
    lines: list[str] = []
    while error is not None:
        lines += [f"{type(error).__module__}.{type(error).__qualname__}", *traceback.format_tb(error.__traceback__)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines

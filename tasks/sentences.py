"""Task `sentences`: positive or negative, from human-rated sentences of four kinds, without any hub."""

from __future__ import annotations

import hashlib
import html
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpft.harness.errors import CannotRun
from dpft.tasks import grouping, lexicon
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.classification import TextClassification
from dpft.tasks.hub import Fetch
from dpft.tasks.lexicon import SDIST, content_of
from dpft.tasks.own.holdout import normalised

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
MINIMUM_RATING = 0.5  # |mean rating| below this is neither positive nor negative
VALIDATION = 1000
TRAIN = 18348
FINGERPRINT = "f08a1b7be56b0eff5e9fd7f4f2776d6c37b5c5a84d571832f6c8cc59af48029c"


class Sentences(grouping.MadeUp, TextClassification):
    """Sign of the mean human rating (-4..4) of a sentence; ratings within 0.5 of zero are left out.

    user_rows: 0, and a user is who wrote a text (300 reviews of products and 498 editorials have several sentences, every other
    sentence is a text by itself); or how many sentences make a made-up user.
    """

    name = "sentences"
    version = 1
    encoded_on_disk = True
    description = "sentiment of sentences from film and product reviews, editorials and tweets, rated by 20 people each"
    source = "Hutto and Gilbert 2014 (ICWSM), in the source distribution of vaderSentiment 3.3.2 on PyPI, MIT"
    public = lexicon.WHAT
    chance = 0.555  # always "positive", the larger class: 55.5% of validation, 52.7% of train
    threshold = 0.75
    template = "*cls**sent_0*_It_was*mask*.*sep+*"
    label_words = ("terrible", "great")
    users = "who wrote a review or an editorial; every tweet and every sentence on a film has an author of its own"

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training sentences; a constant, because the file is pinned by its hash."""
        return TRAIN

    def fingerprint(self, data_dir: Path | None) -> str:
        """That of `load`; a constant, because the file is pinned by its hash, so nothing is fetched for it."""
        return FINGERPRINT

    def lacking(self, data_dir: Path | None) -> list[Fetch]:
        """As `Task.lacking`."""
        return lexicon.lacking(data_dir)

    def load(self, data_dir: Path | None) -> Data:
        """Fetch (once), check and read the sentences. Raises CannotRun when they cannot be had."""
        content, made_up = content_of(data_dir), self.settings["user_rows"]
        train, validation = split(distinct(rated(content)))
        found, texts = (
            Data(train, validation, fingerprint(train, validation)),
            [normalised(row["text"]) for row in train],
        )
        authors = authors_of(content)
        users = grouping.by_hash(texts, made_up) if made_up else [authors[text] for text in texts]
        return replace(found, users=users)

    def public_rows(self, data_dir: Path | None) -> Sequence[Example]:
        """Words with their published ratings."""
        return lexicon.rows(data_dir)


def rated(content: bytes) -> list[tuple[str, float]]:
    """(text, mean rating) of every sentence in the source distribution, in the order of FILES and lines.

    HTML entities are resolved (237 sentences have them: `&lt;3` is a heart; 16 are escaped twice), nothing else changes.
    """
    return [(text, rating) for _, text, rating in _lines(content)]


def authors_of(content: bytes) -> dict[str, str]:
    """Normalised sentence -> what it is from: a review, an editorial, or itself; of several the one that `distinct` keeps."""
    found: dict[str, str] = {}
    for where, text, rating in _lines(content):
        if abs(rating) >= MINIMUM_RATING:
            found.setdefault(normalised(text), where)
    return found


def _lines(content: bytes) -> Iterator[tuple[str, str, float]]:
    """(file and number of the text, sentence, mean rating); numbers are `text_sentence` where texts have several sentences."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as outer:
            inner_bytes = outer.extractfile(INNER).read()
        with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
            for name in FILES:
                text = decode(inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read())
                for line in text.split("\r\n"):
                    if line:
                        number, rating, sentence = line.split("\t")
                        yield f"{name} {number.split('_')[0]}", html.unescape(html.unescape(sentence)), float(rating)
    except (tarfile.TarError, KeyError, AttributeError, ValueError, EOFError) as error:
        raise CannotRun(f"{SDIST} does not hold the rated sentences ({error}); delete it and run again.") from error


def decode(content: bytes) -> str:
    """Text of one file: UTF-8, or Windows-1252 where it is not valid UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def distinct(sentences: list[tuple[str, float]]) -> list[Example]:
    """Labelled rows `{"text", "label"}`; of sentences with the same normalised text the first clearly rated is kept."""
    rows: dict[str, Example] = {}
    for text, rating in sentences:
        if abs(rating) >= MINIMUM_RATING:
            rows.setdefault(normalised(text), {"text": text, "label": int(rating > 0)})
    return list(rows.values())


def split(rows: list[Example]) -> tuple[list[Example], list[Example]]:
    """(train, validation): the rows whose normalised text has one of the 1,000 smallest sha256 are for validation.

    It depends on content only, so neither the order of the rows nor a generator can change it.
    """
    keys = [hashlib.sha256(normalised(row["text"]).encode()).hexdigest() for row in rows]
    held_out = set(sorted(keys)[:VALIDATION])
    pairs = list(zip(rows, keys, strict=True))
    return [row for row, key in pairs if key not in held_out], [row for row, key in pairs if key in held_out]

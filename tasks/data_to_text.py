"""Data to text: E2E (restaurants from slots) and DART (sentences from triples)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dpft.harness.errors import CannotRun, first_line
from dpft.tasks import mirror
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.downloads import data_root
from dpft.tasks.generation import TextGeneration, split
from dpft.tasks.hub import Fetch
from dpft.tasks.own import columns, tabular

if TYPE_CHECKING:
    import polars

REVISION = "refs/convert/parquet"  # the hub's own conversion: `datasets` no longer runs the scripts of these data sets


class DataToText(TextGeneration):
    """Base: a split is `<data_dir>/<hub id>/<split>.parquet`, or the hub's.

    train_split, validation_split: which splits are trained and evaluated on; where both are the same, one in ten of the
    different prompts is held out with all its references.
    """

    version = 1
    encoded_on_disk = True
    options: ClassVar[dict[str, Any]] = {
        **TextGeneration.options,
        "train_split": "train",
        "validation_split": "validation",
    }
    train_rows: ClassVar[int]
    columns: ClassVar[tuple[str, ...]]

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training examples, pairs of a prompt and one reference."""
        if data_root(data_dir) is None and self.settings["train_split"] == "train" != self.settings["validation_split"]:
            return self.train_rows
        return len(self._data(data_dir, count_only=True).train)

    def lacking(self, data_dir: Path | None) -> list[Fetch]:
        """As `Task.lacking`; of a mirror, whether the splits have their columns."""
        splits = dict.fromkeys((self.settings["train_split"], self.settings["validation_split"]))
        return mirror.lacking(self.hub, tuple(splits), data_root(data_dir), self.columns, REVISION)

    def load(self, data_dir: Path | None) -> Data:
        """Read the splits. Raises CannotRun, naming the file, when one is missing, damaged or not as on the hub."""
        return self._data(data_dir)

    def _data(self, data_dir: Path | None, count_only: bool = False) -> Data:
        first, second = self.settings["train_split"], self.settings["validation_split"]
        train = self._split(data_dir, first)
        if first == second:
            return split(train, "prompt")
        if count_only:
            return Data(train, [], "")
        validation = self._split(data_dir, second)
        return Data(train, validation, fingerprint(train, validation))

    def _split(self, data_dir: Path | None, name: str) -> list[Example]:
        other = ", or choose others with train_split= and validation_split="
        return self.rows(*mirror.split_of(self.hub, name, data_root(data_dir), REVISION, other))

    def rows(self, table: polars.DataFrame, where: str) -> list[Example]:
        """`{"prompt", "response"}` of every pair, in order. Raises CannotRun, naming `where`, for other tables."""
        raise NotImplementedError


class E2E(DataToText):
    """Descriptions of restaurants from up to eight slots; the prompt is the slots as Hu et al. 2021 (2106.09685) write them."""

    name = "e2e"
    description = "sentences about a restaurant from a list of its properties (E2E NLG)"
    source = "Novikova et al. 2017 (SIGDIAL), CC BY-SA 4.0"
    hub = "tuetschek/e2e_nlg"
    columns = ("meaning_representation", "human_reference")
    train_rows = 42061
    threshold = 1.5

    def rows(self, table: polars.DataFrame, where: str) -> list[Example]:
        names = dict(zip(("prompt", "response"), self.columns, strict=True))
        return [
            {"prompt": e2e_prompt(row["prompt"]), "response": f" {' '.join(row['response'].split())}"}
            for row in columns.texts(tabular.of_frame(table, where), names)
        ]


def e2e_prompt(meaning: str) -> str:
    """`name[Alimentum], area[city centre]` as `name : Alimentum | area : city centre ||`."""
    return (
        " | ".join(
            f"{slot.strip()} : {value.strip()}" for slot, value in re.findall(r"([^\[\],]+)\[([^\]]*)\]", meaning)
        )
        + " ||"
    )


class Dart(DataToText):
    """Sentences from triples; each reference of a triple set is an example."""

    name = "dart"
    description = "sentences from sets of triples (DART); an example is a triple set with one of its references"
    source = "Nan et al. 2021 (NAACL), arXiv 2007.02871, MIT"
    hub = "Yale-LILY/dart"
    columns = ("tripleset", "annotations")
    train_rows = 62659
    threshold = 2.0

    def rows(self, table: polars.DataFrame, where: str) -> list[Example]:
        import polars

        if lacking := [c for c in ("tripleset", "annotations") if c not in table.columns]:
            raise CannotRun(f"{where} has no column {lacking[0]}; {self.name} needs tripleset and annotations.")
        try:
            pairs = table.select("tripleset", polars.col("annotations").struct.field("text")).explode("text")
            rows = pairs.drop_nulls().rows()
            found = [
                {"prompt": " | ".join(" : ".join(t) for t in triples) + " ||", "response": f" {' '.join(text.split())}"}
                for triples, text in rows
            ]
        except (polars.exceptions.PolarsError, TypeError, AttributeError) as error:
            reason = first_line(error, "unreadable")
            raise CannotRun(f"{where} is not laid out as on the hub ({reason}); copy it again.") from error
        if not found:
            raise CannotRun(f"{where} has no rows; put the whole split there.")
        return found

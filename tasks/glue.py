"""Seven tasks of GLUE (Wang et al. 2019, arXiv 1804.07461), from a local parquet mirror or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import CannotRun
from dpft.tasks import lexicon, mirror
from dpft.tasks.base import Data, Example, fingerprint
from dpft.tasks.classification import TextClassification
from dpft.tasks.downloads import data_root
from dpft.tasks.hub import Fetch

if TYPE_CHECKING:
    import polars


class Glue(TextClassification):
    """Base of the GLUE tasks: `columns` are the one or two texts, `train_rows` the size of the hub's training split."""

    version = 1
    encoded_on_disk = True
    columns: ClassVar[tuple[str, ...]]
    train_rows: ClassVar[int]
    validation_split: ClassVar[str] = "validation"

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training examples: from the mirror's parquet metadata, else the size of the hub's split."""
        root = data_root(data_dir)
        return self.train_rows if root is None else mirror.count_of(self.hub, "train", root)

    def lacking(self, data_dir: Path | None) -> list[Fetch]:
        """As `Task.lacking`; of a mirror, whether both splits have their columns."""
        return mirror.lacking(self.hub, ("train", self.validation_split), data_root(data_dir), (*self.columns, "label"))

    def load(self, data_dir: Path | None) -> Data:
        """Read train and validation; a mirror is `<data_dir>/nyu-mll/glue/<config>/<split>.parquet`.

        Raises CannotRun, naming the path, when the mirror lacks a file or a file is empty, damaged or not as on the
        hub, and when there is no mirror and the hub cannot be reached.
        """
        root = data_root(data_dir)
        train, validation = (self._split(root, name) for name in ("train", self.validation_split))
        return Data(train, validation, fingerprint(train, validation))

    def _split(self, root: Path | None, split: str) -> list[Example]:
        return self._rows(*mirror.split_of(self.hub, split, root))

    def _rows(self, table: polars.DataFrame, where: str) -> list[Example]:
        """Checked rows `{"text", "pair"?, "label"}`."""
        import polars

        needed = (*self.columns, "label")
        if lacking := [column for column in needed if column not in table.columns]:
            raise CannotRun(f"{where} has no column {lacking[0]}; {self.name} needs {', '.join(needed)}.")
        if table.is_empty():
            raise CannotRun(f"{where} has no rows; put the whole split there.")
        table = table.select(needed)
        for column, kind in table.schema.items():  # a cast would make a class of .5, and a text of 7
            if kind != polars.Null and not (kind.is_integer() if column == "label" else kind == polars.String):
                belongs = "whole numbers belong" if column == "label" else "text belongs"
                raise CannotRun(f"{where} has {kind} in column {column}, where {belongs}; copy it again.")
        for column, count in zip(needed, table.null_count().row(0), strict=True):
            if count:
                raise CannotRun(f"{where} has {count} rows without {column}; every row needs one.")
        low, high = table["label"].min(), table["label"].max()
        if low < 0 or high >= self.classes:
            bad = low if low < 0 else high
            raise CannotRun(f"{where} has the label {bad}; {self.name} knows 0 to {self.classes - 1}.")
        names = dict(zip(self.columns, ("text", "pair"), strict=False))
        return table.rename(names).to_dicts()


class Sst2(Glue):
    """Sentiment of film review phrases; 0 negative, 1 positive."""

    name = "sst2"
    hub = "nyu-mll/glue/sst2"
    description = "sentiment of phrases from film reviews (GLUE SST-2)"
    source = "Socher et al. 2013 (EMNLP), through GLUE; research use"
    columns = ("sentence",)
    train_rows = 67349
    public = lexicon.WHAT
    chance = 0.509  # as everywhere here: share of the largest class in validation
    threshold = 0.80
    template = "*cls**sent_0*_It_was*mask*.*sep+*"
    label_words = ("terrible", "great")

    def public_rows(self, data_dir: Path | None) -> Sequence[Example]:
        """Words with their published ratings."""
        return lexicon.rows(data_dir)


class Cola(Glue):
    """Linguistic acceptability; 0 unacceptable, 1 acceptable; judged by Matthews correlation."""

    name = "cola"
    hub = "nyu-mll/glue/cola"
    description = "whether a sentence is grammatical (GLUE CoLA)"
    source = "Warstadt et al. 2019 (TACL), through GLUE; research use"
    columns = ("sentence",)
    train_rows = 8551
    metric = "matthews_correlation"
    metrics = ("matthews_correlation", "accuracy")
    chance = 0.0
    threshold = 0.20
    template = "*cls**sent_0*_This_is*mask*.*sep+*"
    label_words = ("incorrect", "correct")


class Qnli(Glue):
    """Whether a sentence answers a question; 0 entailment, 1 not."""

    name = "qnli"
    hub = "nyu-mll/glue/qnli"
    description = "whether a sentence from Wikipedia answers a question (GLUE QNLI)"
    source = "Rajpurkar et al. 2016 (SQuAD), recast by GLUE; CC BY-SA 4.0"
    columns = ("question", "sentence")
    train_rows = 104743
    chance = 0.505
    threshold = 0.70
    template = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
    label_words = ("Yes", "No")


class Rte(Glue):
    """Textual entailment; 0 entailment, 1 not."""

    name = "rte"
    hub = "nyu-mll/glue/rte"
    description = "whether one text entails another, small (GLUE RTE)"
    source = "Dagan et al. 2005 to Bentivogli et al. 2009, through GLUE; research use"
    columns = ("sentence1", "sentence2")
    train_rows = 2490
    chance = 0.527
    threshold = 0.60
    template = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
    label_words = ("Yes", "No")


class Mnli(Glue):
    """Natural language inference, evaluated on the matched genres; 0 entailment, 1 neutral, 2 contradiction."""

    name = "mnli"
    hub = "nyu-mll/glue/mnli"
    description = "whether a premise entails, contradicts or leaves open a hypothesis (GLUE MNLI, matched)"
    source = "Williams et al. 2018 (NAACL), through GLUE; OANC and CC licences"
    columns = ("premise", "hypothesis")
    train_rows = 392702
    classes = 3
    validation_split = "validation_matched"
    chance = 0.354
    threshold = 0.60
    template = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
    label_words = ("Yes", "Maybe", "No")


class Mrpc(Glue):
    """Paraphrase of news sentences; 1 paraphrase; accuracy is the headline, F1 is computed too."""

    name = "mrpc"
    hub = "nyu-mll/glue/mrpc"
    description = "whether two sentences from news say the same, small (GLUE MRPC)"
    source = "Dolan and Brockett 2005 (IWP), through GLUE; research use"
    columns = ("sentence1", "sentence2")
    train_rows = 3668
    metrics = ("accuracy", "f1")
    chance = 0.684
    threshold = 0.75
    template = "*cls**sent_0**mask*,*+sentl_1**sep+*"
    label_words = ("No", "Yes")


class Qqp(Glue):
    """Duplicate questions; 1 duplicate; accuracy is the headline, F1 is computed too."""

    name = "qqp"
    hub = "nyu-mll/glue/qqp"
    description = "whether two questions on Quora ask the same (GLUE QQP)"
    source = "Iyer et al. 2017 (Quora), through GLUE; non-commercial use"
    columns = ("question1", "question2")
    train_rows = 363846
    metrics = ("accuracy", "f1")
    chance = 0.632
    threshold = 0.75
    template = "*cls**sent_0**mask*,*+sentl_1**sep+*"
    label_words = ("No", "Yes")

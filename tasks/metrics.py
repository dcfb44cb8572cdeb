"""Metrics as `evaluate.Metric` objects, computed by scikit-learn, sacrebleu, rouge-score and NLTK: nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate


def scores(names: Sequence[str], predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Those of `accuracy`, `f1` (of label 1), `macro_f1` (mean over the labels) and `matthews_correlation` that are named."""
    from sklearn import metrics

    compute = {
        "accuracy": metrics.accuracy_score,
        # a model that never says 1 has F1 0, not a warning
        "f1": lambda true, predicted: metrics.f1_score(true, predicted, zero_division=0),
        "macro_f1": lambda true, predicted: metrics.f1_score(true, predicted, average="macro", zero_division=0),
        "matthews_correlation": metrics.matthews_corrcoef,
    }
    return {name: float(compute[name](references, predictions)) for name in names}


def make(names: Sequence[str]) -> evaluate.Metric:
    """A metric of integer labels whose `compute(predictions=..., references=...)` gives a dict of `names`."""
    return _metric(f"{', '.join(names)}, as in scikit-learn", "int64", lambda p, r: scores(names, p, r))


def make_r2() -> evaluate.Metric:
    """A metric of lists of numbers that gives `r2`: over all outputs together, each weighted by its variance."""

    def r2(predictions, references) -> dict[str, float]:
        from sklearn.metrics import r2_score

        return {"r2": float(r2_score(references, predictions, multioutput="variance_weighted"))}

    return _metric("r2, as in scikit-learn, variance weighted", ["float32"], r2)


def make_auc() -> evaluate.Metric:
    """A metric of scores and labels 0 and 1 that gives `auc`, the area under the ROC curve; .5 where all labels are one."""

    def auc(predictions, references) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        return {"auc": float(roc_auc_score(references, predictions)) if len(set(references)) > 1 else 0.5}

    return _metric("auc, as in scikit-learn", "float64", auc, "int64")


def make_perplexity() -> evaluate.Metric:
    """`loss_per_token` (nats) and `perplexity` from each example's negative log-likelihood and number of target tokens."""

    def perplexity(predictions, references) -> dict[str, float]:
        loss = math.fsum(predictions) / sum(references)
        return {"loss_per_token": loss, "perplexity": math.exp(min(loss, 700.0))}  # above that a float has no name

    return _metric("cross-entropy per target token, over all tokens together", "float64", perplexity, "int64")


def make_text() -> evaluate.Metric:
    """Generated texts against one or more references each: `bleu`, `rouge_l`, `nist`; `description` says what each is."""
    import nltk
    import sacrebleu
    from rouge_score import rouge_scorer

    bleu, rouge = sacrebleu.BLEU(), rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def scored(predictions, references) -> dict[str, float]:
        from nltk.translate.nist_score import corpus_nist
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        most = max(len(texts) for texts in references)
        columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        found = {"bleu": bleu.corpus_score(predictions, columns).score}
        lcs = [rouge.score_multi(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
        found["rouge_l"] = 100 * math.fsum(lcs) / len(lcs)
        tokens = Tokenizer13a()
        words = [[tokens(text).split() for text in texts] for texts in references]
        try:
            found["nist"] = corpus_nist(words, [tokens(text).split() for text in predictions], n=5)
        except ZeroDivisionError:  # NLTK's, where no prediction has a word
            found["nist"] = 0.0
        metric.definitions = {
            "bleu": f"sacrebleu {bleu.get_signature()}",
            "rouge_l": f"rouge-score {version('rouge-score')}: F1 of rougeL, Porter stemmer, best reference, mean, x 100",
            "nist": f"NLTK {nltk.__version__} corpus_nist, n = 5, words of sacrebleu's tokenizer 13a",
        }
        return found

    metric = _metric("bleu (sacrebleu), rouge_l (rouge-score), nist (NLTK)", "string", scored, ["string"])
    return metric


def _metric(
    description: str, kind: str | list[str], compute, reference: str | list[str] | None = None
) -> evaluate.Metric:
    """kind, reference: types of a prediction and of a reference, the same where it is None.

    The class is made here and not at module level because its base costs seconds to import.
    """
    import datasets
    import evaluate

    def value(kind: str | list[str]):
        return datasets.Value(kind) if isinstance(kind, str) else datasets.Sequence(datasets.Value(kind[0]))

    types = {"predictions": value(kind), "references": value(kind if reference is None else reference)}

    class Scores(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=description,
                citation="",
                inputs_description="one prediction and one reference per example",
                features=datasets.Features(types),
            )

        def _build_data_dir(self) -> str:
            return ""  # kept in memory: the home folder may be read-only, and runs in parallel must not share files

        def _compute(self, predictions, references) -> dict[str, float]:
            return compute(predictions, references)

    return Scores(keep_in_memory=True, seed=0)  # a seed, so that NumPy's global state is not looked at

"""Metrics as `evaluate.Metric` objects, computed with scikit-learn: nothing is fetched at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate


def scores(names: Sequence[str], predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """`accuracy`, `f1` (of label 1) and `matthews_correlation`, those that are named, as plain floats."""
    from sklearn import metrics

    compute = {
        "accuracy": metrics.accuracy_score,
        # a model that never says 1 has F1 0, not a warning
        "f1": lambda true, predicted: metrics.f1_score(true, predicted, zero_division=0),
        "matthews_correlation": metrics.matthews_corrcoef,
    }
    return {name: float(compute[name](references, predictions)) for name in names}


def make(names: Sequence[str]) -> evaluate.Metric:
    """A metric whose `compute(predictions=..., references=...)` gives a dict of `names`.

    The class is made here and not at module level because its base costs seconds to import.
    """
    import datasets
    import evaluate

    class ClassificationScores(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            integers = {name: datasets.Value("int64") for name in ("predictions", "references")}
            return evaluate.MetricInfo(
                description=f"{', '.join(names)}, as in scikit-learn",
                citation="",
                inputs_description="integer labels",
                features=datasets.Features(integers),
            )

        def _build_data_dir(self) -> str:
            return ""  # kept in memory: the home folder may be read-only, and runs in parallel must not share files

        def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
            return scores(names, predictions, references)

    return ClassificationScores(keep_in_memory=True, seed=0)  # a seed, so that NumPy's global state is not looked at

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
    """A metric of integer labels whose `compute(predictions=..., references=...)` gives a dict of `names`."""
    return _metric(f"{', '.join(names)}, as in scikit-learn", "int64", lambda p, r: scores(names, p, r))


def make_r2() -> evaluate.Metric:
    """A metric of lists of numbers that gives `r2`: over all outputs together, each weighted by its variance."""

    def r2(predictions, references) -> dict[str, float]:
        from sklearn.metrics import r2_score

        return {"r2": float(r2_score(references, predictions, multioutput="variance_weighted"))}

    return _metric("r2, as in scikit-learn, variance weighted", ["float32"], r2)


def _metric(description: str, kind: str | list[str], compute) -> evaluate.Metric:
    """The class is made here and not at module level because its base costs seconds to import."""
    import datasets
    import evaluate

    value = datasets.Value(kind) if isinstance(kind, str) else datasets.Sequence(datasets.Value(kind[0]))

    class Scores(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=description,
                citation="",
                inputs_description="one prediction and one reference per example",
                features=datasets.Features({name: value for name in ("predictions", "references")}),
            )

        def _build_data_dir(self) -> str:
            return ""  # kept in memory: the home folder may be read-only, and runs in parallel must not share files

        def _compute(self, predictions, references) -> dict[str, float]:
            return compute(predictions, references)

    return Scores(keep_in_memory=True, seed=0)  # a seed, so that NumPy's global state is not looked at

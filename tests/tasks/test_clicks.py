"""Clicks: what the data are like, their metric, and methods for token tables on a table that is mostly unseen."""

import numpy
import pytest
from small_runs import quiet

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.query.queries import Seen
from dpft.harness.runs import registry
from dpft.harness.runs.plan import plan
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.settings import Settings
from dpft.tasks import metrics
from dpft.tasks.base import ModelSpec
from dpft.tasks.clicks import SMALL, TRAIN, VALIDATION, WIDTH, Clicks

ROWS = 20_000
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return Clicks({"rows": ROWS}).load(None)


@pytest.fixture(scope="module")
def counted(data):
    """(ids [n, 8], labels, how often each id occurs) of the training rows."""
    ids = numpy.stack([row["input_ids"] for row in data.train])
    return ids, numpy.array([row["labels"] for row in data.train]), numpy.bincount(ids.ravel(), minlength=ROWS)


def test_every_field_has_rows_of_its_own_and_the_rows_are_all_there_are(data, counted):
    ids, labels, _ = counted
    assert ids.shape == (TRAIN, 8) and len(data.validation) == VALIDATION and set(labels) == {0, 1}
    sizes = Clicks({"rows": ROWS})._sizes()
    assert sum(sizes) == ROWS and sizes[:6] == SMALL and sum(Clicks()._sizes()) == 1_000_000
    first = 0
    for field, size in zip(ids.T, sizes, strict=True):
        assert field.min() >= first and field.max() < first + size
        first += size
    assert Clicks({"rows": ROWS}).load(None).fingerprint == data.fingerprint
    assert Clicks({"rows": ROWS + 1}).load(None).fingerprint != data.fingerprint


def test_frequencies_are_those_of_zipf_and_numbers_of_rows_say_nothing_about_them(counted):
    *_, counts = counted
    for first, last in ((8, 32), (sum(SMALL), ROWS - (ROWS - sum(SMALL)) * 3 // 5)):
        ranked = numpy.sort(counts[first:last])[::-1]
        assert ranked[0] / ranked[7] == pytest.approx(8**1.2, rel=0.15)
        assert abs(numpy.corrcoef(numpy.arange(last - first), counts[first:last])[0, 1]) < 0.5
    large = counts[sum(SMALL) :]
    assert large[:100].sum() < 0.2 * large.sum()


def test_what_can_be_learned_is_mostly_in_frequent_ids_and_some_of_it_is_not(data, counted):
    ids, labels, counts = counted
    clicked, mean = numpy.bincount(ids.ravel(), numpy.repeat(labels, 8), minlength=ROWS), labels.mean()
    share = (clicked + 20 * mean) / (counts + 20)
    weights = numpy.log(share / (1 - share)) - numpy.log(mean / (1 - mean))
    theirs = numpy.stack([row["input_ids"] for row in data.validation])
    references = [row["labels"] for row in data.validation]

    def auc(least):
        scored = numpy.where(counts >= least, weights, 0.0)[theirs].sum(1)
        return metrics.make_auc().compute(predictions=scored, references=references)["auc"]

    found = {least: auc(least) for least in (0, 300, 10_000)}
    assert 0.6 < found[10_000] < 0.72 < 0.75 < found[300] < found[0] < 0.83
    assert (counts >= 300).sum() < 400


def test_auc_is_the_share_of_pairs_in_order():
    generator = numpy.random.default_rng(0)
    scores, labels = generator.standard_normal(40).round(1), generator.integers(0, 2, 40)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    found = metrics.make_auc().compute(predictions=scores.tolist(), references=labels.tolist())["auc"]
    assert found == pytest.approx(sum(pairs) / len(pairs)) and found != 0.5
    assert metrics.make_auc().compute(predictions=[0.1, 0.2], references=[1, 1])["auc"] == 0.5


@pytest.mark.parametrize("rows", [100, 10**9, 2e4, "many", True])
def test_another_number_of_rows_is_refused(rows):
    with pytest.raises(BadInput):
        resolve({"task": "clicks", "method": "dp-adam", "rows": rows})


def test_another_model_is_refused(data):
    with pytest.raises(CannotRun, match="model of its own"):
        Clicks({"rows": ROWS}).prepare(data, ModelSpec("minilm-l6"), None)


def spec_of(method, **more):
    settings = {"epsilon": 8.0, "batch_size": 512, "steps": 3, "eval_every": 3, "eval_examples": 200, "lr": 0.03}
    return resolve({"task": "clicks", "rows": ROWS, "method": method, "head_lr_factor": 1.0, **settings, **more})


def made(method, **more):
    return run.execute(spec_of(method, **more), Settings(), quiet)


def test_an_example_touches_one_row_of_each_field(data):
    method = registry.make("dp-adafest", "mean", {})
    prepared = Clicks({"rows": ROWS}).prepare(data, ModelSpec("mlp"), None)
    assert method.skip(prepared.model) is None
    method.prepare(prepared.model, None)
    batch = prepared.collate(data.train[:5])
    found = method.rows_of(Seen(prepared.model, batch, None)).to_dense()
    assert found.shape == (5, ROWS) and found.sum(1).tolist() == [8.0] * 5
    assert all(
        set(row.nonzero().flatten().tolist()) == set(e["input_ids"])
        for row, e in zip(found, data.train[:5], strict=True)
    )
    assert prepared.collate([])["input_ids"].shape == (0, 8)


@pytest.mark.parametrize(
    ("method", "more", "rows"),
    [
        ("dp-adafest", {"tau": 5.0, "noise_ratio": 1.0}, (2, 150)),
        ("dp-fest", {"choose": "votes", "kept_rows": 50}, (50, 50)),
        ("frozen-embeddings", {}, (0, 0)),
        ("dp-adam", {}, (ROWS, ROWS)),
    ],
)
def test_methods_for_tables_train_the_rows_they_say_and_hold_moments_of_no_others(method, more, rows):
    record, curve = made(method, **more)
    assert record["status"] == "done", record["error"]
    cost = record["cost"]
    rest = cost["total_parameters"] - ROWS * WIDTH
    assert rows[0] <= (cost["trainable_parameters"] - rest) / WIDTH <= rows[1]
    held = (
        cost["peak_bytes"].get("optimizer_state", 0) - 12 * rest
    )  # two moments of the rest, and what they are made with
    table = ROWS * WIDTH * 4
    assert held > 1.9 * table if method == "dp-adam" else held < 0.2 * table
    assert record["result"]["metric"] == "auc" and curve[-1]["metric"] is not None


def test_a_larger_table_costs_a_sparse_method_its_counts_and_no_more():
    """Beside the table itself: counts in float64, their sum and their noise, and one place a row."""
    found = {}
    for rows in (ROWS, 10 * ROWS):
        peak = made("dp-adafest", rows=rows, tau=5.0)[0]["cost"]["peak_bytes"]
        found[rows] = sum(peak.values()) - peak["parameters"]
    grown = (found[10 * ROWS] - found[ROWS]) / (9 * ROWS)
    assert grown <= 8 + 4 + 4 + 1, "bytes a row"


def test_what_the_plan_says_of_n():
    assert plan(spec_of("dp-adam"), None).num_examples == TRAIN == len(Clicks({"rows": ROWS}).load(None).train)

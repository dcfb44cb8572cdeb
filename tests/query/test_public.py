"""Public examples: who has them, who gets them, and that private data are what they were."""

import pytest
import torch
from small_runs import a_spec, trained

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import public_rows, run
from dpft.methods.clipping.base import ClippingRule
from dpft.methods.full import DPAdam

WITH = {name: task for name, task in registry.tasks().items() if task.public}


class LearnsFromPublic(DPAdam):
    needs_public = True

    def prepare(self, model, generator):
        self.seen = self.public.batch(4), len(self.public)
        return super().prepare(model, generator)


@pytest.fixture
def learner(monkeypatch):
    monkeypatch.setitem(registry.methods(), "learner", LearnsFromPublic)
    monkeypatch.setattr(LearnsFromPublic, "name", "learner")
    return "learner"


def test_a_method_that_needs_public_examples_gets_them_encoded_before_it_prepares(
    learner, tiny_bert, settings, setup_of
):
    setup = setup_of(learner)
    batch, count = setup.method.seen
    assert count == 2048 and len(batch["labels"]) == 4
    assert batch.keys() == setup.prepared.collate(setup.prepared.train[:4]).keys()
    assert setup.method.rule.public is setup.method.public
    losses = setup.method.public.loss(setup.prepared.model, batch)
    assert losses.shape == (4,)
    found = setup.method.public.gradient(setup.prepared.model, setup.parameters, batch)
    expected = torch.autograd.grad(losses.mean(), [setup.parameters["head.bias"]])[0]
    assert torch.allclose(found["head.bias"], expected) and found.keys() == setup.parameters.keys()
    trained(setup)  # a look at public data leaves nothing behind that the engine or the guard minds


def test_batches_go_on_where_the_last_ended_and_begin_anew_after_the_end(learner, setup_of):
    examples = setup_of(learner).method.public
    first, second = examples.batch(2000), examples.batch(2000, 1)
    assert torch.equal(second["labels"][48:148], first["labels"][:100])


def test_a_method_without_need_has_none_and_its_data_are_loaded_without(setup_of, monkeypatch):
    monkeypatch.setattr(registry.task("sst2"), "public_rows", None)
    setup = setup_of("dp-adam")
    assert not hasattr(setup.method, "public") and not setup.prepared.public


def test_a_task_without_public_data_is_refused_before_anything_is_loaded(learner, tiny_bert):
    with pytest.raises(
        BadInput, match="learner learns from public data, and the task rte has none; take .* sentences, sst2"
    ):
        resolve({"task": "rte", "method": learner, "epsilon": 3.0})


def test_a_clipping_rule_may_need_them_too(monkeypatch, tiny_bert, setup_of):
    class Rule(ClippingRule):
        name, needs_public = "rule", True

    monkeypatch.setitem(registry.clippings(), "rule", Rule)
    with pytest.raises(
        BadInput, match="rule learns from public data, and the task rte has none; take another clipping"
    ):
        resolve({"task": "rte", "method": "dp-adam", "clipping": "rule"})
    assert len(setup_of("last-layer", clipping="rule").method.rule.public) == 2048


@pytest.mark.parametrize("name", sorted(registry.tasks()))
def test_a_task_says_whether_it_has_public_rows(name):
    task = registry.task(name)()
    if name in WITH:
        assert len(task.public_rows(None)) >= 64
    else:
        with pytest.raises(CannotRun, match=f"The task {name} has no public data"):
            task.public_rows(None)


@pytest.mark.parametrize("name", ["sentences", "digits", "low-rank"])
def test_public_rows_are_no_training_rows(name):
    task = registry.task(name)()
    key = {"sentences": lambda r: r["text"].casefold(), "digits": lambda r: r["image"].tobytes()}.get(
        name, lambda r: r["inputs"].tobytes()
    )
    data = task.load(None)
    if name == "sentences":  # one is a single word of the list
        data.train[:] = [row for row in data.train if " " in row["text"]]
    shared = {key(row) for row in task.public_rows(None)} & {key(row) for row in [*data.train, *data.validation]}
    assert not shared


def test_memory_says_why_it_cannot_predict(learner):
    from dpft.harness.memory.prediction import Question, predict

    with pytest.raises(CannotRun, match="learns from public data"):
        predict(Question("roberta-base", learner, 2, 16))


def test_a_record_says_how_many(learner, tiny_bert, settings):
    record, _ = run.execute(a_spec(learner, tiny_bert), settings, lambda step, row: None)
    assert record["provenance"]["public_examples"] == 2048, record["error"]
    assert public_rows.needed(registry.make(learner, "mean", {}, "abadi"))


@pytest.mark.parametrize("options", [{"clipping": "dp-lac"}, {}])
def test_memory_and_bench_refuse_what_learns_from_public_data_whoever_does(options, dpft):
    """The method, or its clipping rule."""
    method = "dp-adam" if options else "dp-selft"
    extra = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    code, _, err = dpft("memory", "--model", "roberta-base", "--method", method, "--batch", 2, "--length", 16, *extra)
    assert code == 2 and "learns from public data of a task, which a prediction has not" in err

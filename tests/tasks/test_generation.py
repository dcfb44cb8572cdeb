"""Tasks that generate text: their data, and every method on them."""

import json
import re
from pathlib import Path

import causal_cases
import polars
import pytest
import torch
from asking import heard
from small_runs import quiet

from dpft.harness import report
from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.query.queries import Gradients, named
from dpft.harness.records.store import Store
from dpft.harness.runs import registry
from dpft.harness.runs.plan import plan
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.core import encodings_of
from dpft.harness.train.settings import Settings
from dpft.tasks import data_to_text, models

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = Path(__file__).parents[3] / "shared" / "data"
WITHOUT_PUBLIC = {"dp-kfc", "dp-selft", "dp-sft", "pazo"}  # refused: the task has no public data
METHODS = sorted(registry.methods().keys() - WITHOUT_PUBLIC)
HEADED = {"dp-sapf", "lp-ft"}  # skipped: language models have no new head to begin with
NOTHING_TO_TRAIN = {*(("last-layer", kind) for kind in ("gpt2", "llama", "opt")), ("dp-bitfit", "llama")}
OPT = ("dp-zo", "dp-lora", "last-layer")  # the model of the papers on zeroth order
TIED = {
    ("dp-adafest", "gpt2"),
    ("dp-fest", "gpt2"),
    ("frozen-embeddings", "gpt2"),
}  # its tokens' table is the last layer


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return causal_cases.mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    return lambda kind: made.setdefault(kind, causal_cases.save(kind, tmp_path_factory.mktemp(kind)))


def settings_of(method, folder, **more):
    size = dict(task="e2e", batch_size=30, steps=2, eval_every=1, epsilon=3.0, max_length=40, generate_examples=6)
    return resolve({"method": method, "model": folder, **size, "max_new_tokens": 10, **more})


# --- data -----------------------------------------------------------------------------------------------------------


def test_e2e_from_a_mirror(mirror, monkeypatch):
    monkeypatch.delenv("DPFT_DATA", raising=False)
    task = registry.task("e2e")
    assert task().train_size(None) == 42061 and task().train_size(mirror) == 300
    data = task().load(mirror)
    assert (len(data.train), len(data.validation)) == (300, 24)
    assert data.train[0] == {
        "prompt": "name : Blue Spice | area : riverside | food : Chinese ||",
        "response": " Blue Spice serves Chinese food .",
    }
    assert (
        data_to_text.e2e_prompt("near[Café Adriatic], familyFriendly[no]")
        == "near : Café Adriatic | familyFriendly : no ||"
    )
    with pytest.raises(CannotRun, match="has no file .*test.parquet but the splits train, validation; put that split"):
        task({"validation_split": "test"}).load(mirror)
    with pytest.raises(CannotRun, match="put that split of tuetschek/e2e_nlg there as parquet"):
        task().load(mirror.parent)
    one = task({"validation_split": "train"})
    data = one.load(mirror)
    assert one.train_size(mirror) == len(data.train) and len(data.train) + len(data.validation) == 300
    held = {row["prompt"] for row in data.validation}
    assert held and not held & {row["prompt"] for row in data.train}, "references of one meaning must stay together"


def test_dart_has_an_example_for_each_reference(tmp_path):
    folder = tmp_path / "Yale-LILY/dart"
    folder.mkdir(parents=True)
    triples = [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "TYPE", "Private"]]
    rows = [
        {"tripleset": triples, "annotations": {"source": ["a", "b"], "text": ["One  text.", "Another."]}},
        {"tripleset": triples[:1], "annotations": {"source": ["c"], "text": ["It joined."]}},
    ]
    for name in ("train", "validation"):
        polars.DataFrame(rows).write_parquet(folder / f"{name}.parquet")
    task = registry.task("dart")()
    prompt = "Mars Hill : JOINED : 1973 | Mars Hill : TYPE : Private ||"
    assert task.load(tmp_path).train == [
        {"prompt": prompt, "response": " One text."},
        {"prompt": prompt, "response": " Another."},
        {"prompt": "Mars Hill : JOINED : 1973 ||", "response": " It joined."},
    ]
    assert task.train_size(tmp_path) == 3
    polars.DataFrame({"tripleset": ["x"], "annotations": [1]}).write_parquet(folder / "train.parquet")
    with pytest.raises(CannotRun, match="train.parquet is not laid out as on the hub"):
        task.load(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared mirror is not there")
def test_real_mirrors():
    e2e = registry.task("e2e")({"train_split": "validation", "validation_split": "test"}).load(SHARED)
    assert (len(e2e.train), len(e2e.validation)) == (4672, 4693)
    assert len({row["prompt"] for row in e2e.validation}) == 630
    dart = registry.task("dart")({"train_split": "validation"}).load(SHARED)
    assert len(dart.train) + len(dart.validation) == 6980  # Nan et al. 2021, table 2
    held, kept = ({row["prompt"] for row in rows} for rows in (dart.validation, dart.train))
    assert len(held) == (len(held) + len(kept)) // 10 and not held & kept


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"packing": True}, "Packing puts several examples into one sequence"),
        ({"beams": 0}, "beams must be 1 or more"),
        ({"beam": 2}, "did you mean 'beams'"),
        ({"max_new_tokens": "many"}, "must look like its default 64"),
        ({"task": "causal-lm"}, "give it with --set file=PATH"),
        ({"task": "causal-lm", "file": "x.jsonl", "generate_examples": 3}, "no prompts to generate from"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(more, complaint):
    with pytest.raises(BadInput, match=complaint):
        resolve({"task": "e2e", "method": "dp-adam", **more})


def test_task_options_are_part_of_the_run_id_and_old_ids_stay():
    plain = resolve({"task": "e2e", "method": "dp-adam"})
    assert resolve({"task": "e2e", "method": "dp-adam", "beams": 1}).run_id == plain.run_id
    assert resolve({"task": "e2e", "method": "dp-adam", "beams": 5}).run_id != plain.run_id
    assert "task_options" not in resolve({"task": "sst2", "method": "dp-adam"}).canonical()


def test_heads_and_mismatched_models_are_refused(mirror, folders):
    for more, complaint in (({"head": "mean"}, "leave out head=mean"), ({"max_length": 49}, "at most 48 tokens")):
        record, _ = run.execute(settings_of("dp-lora", folders("gpt2"), **more), Settings(mirror), quiet)
        assert record["status"] == "error" and complaint in record["error"]


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_prompts_leave_the_model_positions_for_what_is_written(kind, mirror, folders):
    """48 positions, and prompts of about 16 tokens."""
    for new, complaint in ((40, None), (47, None), (48, "lower max_new_tokens from 48")):
        one = settings_of("dp-bitfit", folders(kind), max_new_tokens=new, max_length=48, steps=1)
        record, _ = run.execute(one, Settings(mirror), quiet)
        assert record["status"] == ("done" if complaint is None else "error"), record["error"]
        assert complaint is None or complaint in record["error"]


# --- the packaged model ---------------------------------------------------------------------------------------------


def test_names_of_models(monkeypatch, tmp_path):
    assert models.resolve("gpt2") == "openai-community/gpt2" and models.resolve("opt-125m") == "facebook/opt-125m"
    models._packaged_smollm2.cache_clear()
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"other weights")
    with pytest.raises(CannotRun, match="is not the pinned SmolLM2"):
        models.resolve("smollm2-135m")
    models._packaged_smollm2.cache_clear()


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(WITHOUT_PUBLIC))
def test_methods_that_learn_from_public_data_are_refused(method, folders):
    with pytest.raises(BadInput, match="learns from public data, and the task e2e has none"):
        settings_of(method, folders("gpt2"))


@pytest.mark.parametrize(
    "method, kind", [*((m, kind) for m in METHODS for kind in ("gpt2", "llama")), *((m, "opt") for m in OPT)]
)
def test_every_method_runs_and_the_engines_agree(method, kind, mirror, folders):
    phases = {"steps": 5, "eval_every": 5} if "selection_fraction" in registry.method(method).options else {}
    rank = {"rank": 4} if method == "prism" else {}
    one = settings_of(method, folders(kind), **phases, **rank)
    record, curve = run.execute(one, Settings(mirror), quiet)
    if method in HEADED:
        assert record["status"] == "skipped" and "head and this model has none" in record["error"]
        return
    if (method, kind) in NOTHING_TO_TRAIN | TIED:
        other = "dp-adam" if (method, kind) in TIED else "dp-lora"
        assert record["status"] == "skipped" and f"use {other}" in record["error"]
        return
    assert record["status"] == "done", record["error"]
    result = record["result"]
    assert result["final"] == result["all_metrics"]["loss_per_token"] == curve[-1]["metric"] > 0
    assert result["chance_is"] == "the model before training" and result["chance"] > 0
    assert {"perplexity", "bleu", "rouge_l", "nist"} < set(result["all_metrics"])
    assert result["definitions"]["generation"] == "6 prompts, greedy search, max_new_tokens 10"
    before, after = result["samples"]["before"], result["samples"]["after"]
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after] and len(after) == 4
    if Gradients not in registry.method(method).asks or not registry.method(method).private:
        return
    setup = run.build(one, Settings(mirror), plan(one, mirror), None)
    with torch.no_grad():
        for p in setup.parameters.values():
            if not p.any():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    (question,) = named(heard(setup), Gradients).values()
    encodings = encodings_of(question, setup.parameters)
    batch = setup.prepared.collate(setup.prepared.train[:5])
    found = {}
    setup.engine.close()
    for name in ("factored", "reference"):
        engine = engine_class(name)(setup.prepared.model, setup.engine.loss, setup.parameters, setup.clock)
        total = zero_sums(setup.parameters, encodings)
        with engine.under(question.loss):
            _, norms = engine.accumulate(batch, total, 0.1, encodings)
        engine.close()
        found[name] = torch.cat([t.flatten().double() for t in total.values()]), norms.double()
    assert torch.allclose(found["factored"][1], found["reference"][1], rtol=1e-5)
    assert (found["factored"][0] - found["reference"][0]).norm() <= 1e-5 * found["reference"][0].norm()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen2", "qwen3"])
def test_lora_adapts_the_attention_of_each_architecture(kind, mirror, folders):
    one = settings_of("dp-lora", folders(kind))
    setup = run.build(one, Settings(mirror), plan(one, mirror), None)
    setup.engine.close()
    targets = {re.search(r"(\w+)\.lora_[AB]", name)[1] for name in setup.parameters}
    assert targets == ({"c_attn"} if kind == "gpt2" else {"q_proj", "k_proj", "v_proj"})
    assert len(setup.parameters) == 2 * 2 * len(targets) and setup.head == frozenset()


def test_training_teaches_the_format_and_a_resumed_run_keeps_its_first_samples(mirror, folders, tmp_path):
    more = dict(batch_size=100, steps=30, eval_every=10, lr=2e-2, eval_examples=8, beams=2, schedule="linear")
    one = settings_of("non-private", folders("llama"), **more)
    path = tmp_path / "run.ckpt"

    def interrupt(step, row):
        if step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(one, Settings(mirror, checkpoint_seconds=0.0), interrupt, path)
    record, _ = run.execute(one, Settings(mirror), quiet, path)
    whole, curve = run.execute(one, Settings(mirror), quiet)
    assert record["result"] == whole["result"]
    assert whole["result"]["final"] < 0.3 * curve[0]["loss"] and whole["result"]["all_metrics"]["bleu"] > 30
    assert whole["result"]["chance"] == pytest.approx(curve[0]["loss"], rel=0.2), "of the model before training"
    samples = whole["result"]["samples"]
    assert samples["before"] != samples["after"] and samples["after"][0]["output"].endswith(".")
    assert "2 beams" in whole["result"]["definitions"]["generation"]


def test_a_user_s_own_text_is_in_no_record_unless_asked_for(folders, tmp_path):
    rows = [{"prompt": f"name : Cotto {i}", "response": f"Cotto is a pub zebra{i} ."} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    size = dict(task="instruction", file=str(tmp_path / "rows.jsonl"), batch_size=6, steps=1, eval_every=1, epsilon=3.0)
    size |= dict(max_length=40, generate_examples=2, max_new_tokens=4, method="dp-lora", model=folders("llama"))
    store, texts = Store(tmp_path), {}
    for samples in (0, 2):
        one = resolve({**size, **({"samples": samples} if samples else {})})
        record, curve = run.execute(one, Settings(None), quiet)
        assert record["status"] == "done", record["error"]
        store.write(record, curve)
        texts[samples] = json.dumps(record)
        assert ("zebra" in texts[samples]) == bool(samples)
    found = {
        public: report.markdown(report.summaries(store), store, None, report.Options(public=public))
        for public in (0, 1)
    }
    assert "zebra" in found[0] and "a reference |" in found[0] and "rouge_l" in found[1]
    assert "zebra" not in found[1] and "a reference |" not in found[1]

"""Memory that is predicted from shapes: against published sizes, against real steps, and for engines that must agree."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine_cases import assert_same, batch_for, clipped, loss, model_for, no_clock
from torch._subclasses.fake_tensor import FakeTensorMode

from dpft.harness.engine.base import RunningSums
from dpft.harness.errors import BadInput
from dpft.harness.memory import claims, skeletons
from dpft.harness.memory.engines import Materialised, TwoPasses
from dpft.harness.memory.largest import largest, parse_size
from dpft.harness.memory.prediction import Question, measure, predict
from dpft.harness.memory.shapes import SHAPES, Shape

SMALL = {
    "small-roberta": ("roberta", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "small-gpt2": ("gpt2", {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "small-opt": (
        "opt",
        {"vocab_size": 300, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64,
         "num_attention_heads": 2},
    ),
    "small-llama": (
        "llama",
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    ),
    "small-vit": (
        "vit",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
         "patch_size": 8},
    ),
}  # fmt: skip
METHODS = ("non-private", "materialised", "ghost", "dp-adam", "dp-lora", "dp-grape", "dp-zo", "inference")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    for name, (kind, settings) in SMALL.items():
        monkeypatch.setitem(SHAPES, name, Shape(kind, settings, 0, ""))


@pytest.mark.parametrize("name", SHAPES)
def test_a_built_in_shape_has_as_many_parameters_as_the_published_checkpoint(name):
    import transformers

    shape = SHAPES[name]
    with FakeTensorMode():
        config = transformers.AutoConfig.for_model(shape.kind, **shape.settings)
        model = skeletons.untrained(getattr(transformers, shape.counted), config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["small-roberta", "small-opt"])
def test_what_is_predicted_is_what_real_steps_hold(model, method, precision, one_thread):
    options = {"dp-grape": {"rank": 4}, "dp-zo": {"directions": 2}}.get(
        method, {}
    )  # 2: its memory is that of any number
    question = Question(model, method, batch=6, length=24, precision=precision, options=options)
    predicted, real = predict(question), measure(question)
    assert predicted.total == pytest.approx(real.total, rel=0.05)
    assert predicted.parameters == real.parameters and predicted.trainable == real.trainable


@pytest.mark.parametrize("model", ["small-gpt2", "small-llama", "small-vit", "minilm-l6"])
def test_and_for_other_architectures_and_the_real_minilm(model, one_thread):
    for method in ("dp-adam", "dp-grape"):
        question = Question(model, method, batch=4, length=24)
        predicted, real = predict(question), measure(question)
        assert predicted.total == pytest.approx(real.total, rel=0.05)
        assert predicted.peak["parameters"] == real.peak["parameters"]


@pytest.mark.parametrize(
    "method, model",
    [
        ("dora", "small-roberta"),
        ("vera", "small-gpt2"),
        ("adapter", "small-llama"),
        ("prompt", "small-roberta"),
        ("prompt", "small-llama"),
        ("prefix", "small-roberta"),
        ("prefix", "small-llama"),
    ],
)
def test_what_a_method_adds_to_a_model_is_predicted_too(method, model, one_thread):
    """VeRA's layers share their frozen matrices, which are counted once; a prompt makes every input longer."""
    question = Question(model, method, batch=4, length=24)
    predicted, real = predict(question), measure(question)
    assert predicted.total == pytest.approx(real.total, rel=0.05)
    assert (predicted.parameters, predicted.trainable) == (real.parameters, real.trainable)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["dp-adam", "dp-grape"])
def test_the_allocator_of_a_gpu_agrees(method):
    question = Question("roberta-base", method, batch=16, length=128)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        measure(question)
    assert predict(question).total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_materialised_gradients_grow_with_the_batch_as_the_parameters_and_ours_do_not():
    small, large = (predict(Question("small-roberta", "materialised", batch, 24)) for batch in (4, 8))
    assert large.peak["per_example"] >= 4 * (large.peak["parameters"]) + small.peak["per_example"] - 1024
    ours = predict(Question("small-roberta", "dp-adam", 8, 24))
    assert ours.peak.get("per_example", 0) < large.peak["per_example"] / 4


def test_what_dp_grape_keeps_falls_as_rank_over_the_smaller_side():
    rows = [line.split("|") for line in claims.state("small-roberta", "classes").splitlines() if "|" in line][2:]
    assert [int(row[1]) for row in rows] == [rank for rank in claims.RANKS if rank < 32]
    for row in rows:
        assert float(row[4]) < 1
        assert float(row[4]) == pytest.approx(float(row[5]), abs=1e-4)


@pytest.mark.parametrize("engine", [Materialised, TwoPasses])
@pytest.mark.parametrize("kind", ["bert", "roberta", "vit"])
def test_the_engines_that_are_compared_release_the_same_sum(engine, kind):
    model, batch = model_for(kind), batch_for(kind)
    expected, losses, norms = clipped("reference", model, batch)
    other = engine(model, loss, dict(model.named_parameters()), no_clock)
    total = RunningSums(other.parameters, {})
    seen = other.accumulate(batch, total, 0.5, {})
    other.close()
    assert_same(total.complete(), expected, 1e-10)
    assert torch.allclose(seen[0], losses) and torch.allclose(seen[1], norms, rtol=1e-10)


def test_the_largest_batch_fits_and_one_more_does_not():
    question = Question("small-roberta", "dp-adam", 1, 24)
    limit = predict(replace(question, batch=37)).total
    batch, answer = largest(question, limit)
    assert batch >= 37 and answer.total <= limit < predict(replace(question, batch=batch + 1)).total
    assert largest(question, answer.peak["parameters"]) == (0, None)


def test_sizes():
    assert (parse_size("80GiB"), parse_size("1.5 MB"), parse_size("4096")) == (80 * 2**30, 1_500_000, 4096)
    for text in ("", "many", "-1GiB", "0", "3 parsecs", "1e400GiB"):
        with pytest.raises(BadInput, match="no amount of memory"):
            parse_size(text)


def test_bad_questions_are_answered_in_one_sentence(tmp_path):
    for question, message in (
        (Question("robrta-large", "dp-adam", 4), "did you mean 'roberta-large'"),
        (Question("small-roberta", "dp-adm", 4), "did you mean 'dp-adam'"),
        (Question("small-roberta", "dp-adam", 4, 100_000), "at most 512 tokens"),
        (Question("small-vit", "dp-adam", 4, head="tokens"), "leave out --head"),
        (Question("small-vit", "dp-adam", 4, head="tail"), "no head 'tail'"),
        (Question(str(tmp_path), "dp-adam", 4), "holds no transformers model"),
        (Question("small-roberta", "rmt", 4, 24), "depends on values"),
        (Question("small-roberta", "sparta", 4, 24), "has kinds of steps"),
    ):
        with pytest.raises(BadInput, match=message):
            predict(question)


def test_the_command_prints_one_document():
    command = [sys.executable, "-m", "dpft.harness", "memory", "--model", "minilm-l6", "--batch", "4", "--length", "16"]
    found = subprocess.run([*command, "--method", "dp-adam", "--json"], capture_output=True, text=True, check=True)
    (row,) = json.loads(found.stdout)
    assert row["total_bytes"] == sum(row["peak_bytes"].values()) > 4 * 22_000_000

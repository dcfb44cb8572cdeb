"""Blocks that run again in the backward pass: less memory, and the same run."""

import dataclasses

import pytest
from small_runs import TWO_STEPS, a_spec, quiet

from dpft.harness.train import run

pytestmark = pytest.mark.usefixtures("one_thread")


def made(method, tiny_bert, settings, **more):
    return run.execute(a_spec(method, tiny_bert, steps=2, eval_examples=16, **more), settings, quiet)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dp-adam", {}),
        ("dp-adam", {"clip_groups": "layer"}),
        ("dp-lora", {}),
        ("prefix", {}),
        ("non-private", {"epsilon": None}),
    ],
)
def test_a_run_is_the_same_and_holds_fewer_activations(method, more, tiny_bert, settings):
    (one, plain), (two, again) = (
        made(method, tiny_bert, dataclasses.replace(settings, recompute=recompute), **more)
        for recompute in (False, True)
    )
    assert one["status"] == two["status"] == "done", two["error"]
    assert one["run_id"] == two["run_id"] and two["provenance"]["settings"]["recompute"]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in plain], rel=1e-6)
    assert two["result"]["final"] == one["result"]["final"]
    held, fewer = (record["cost"]["peak_bytes"] for record in (one, two))
    assert fewer["activations"] < held["activations"] / 2
    if method != "dp-adam" or more:  # where norms are known at the end alone, factors of all layers are held until then
        assert sum(fewer.values()) < 0.9 * sum(held.values())


def test_a_block_that_would_compute_something_else_is_refused(tiny_bert, settings, monkeypatch):
    from transformers.models.bert.modeling_bert import BertLayer

    forward = BertLayer.forward

    def forgetful(self, hidden, *rest, **more):
        return forward(self, hidden + float(self.gradient_checkpointing), *rest, **more)

    monkeypatch.setattr(BertLayer, "forward", forgetful)
    record, _ = made("dp-adam", tiny_bert, dataclasses.replace(settings, recompute=True))
    assert record["status"] == "error" and "computes something else where its blocks run again" in record["error"]


def test_a_model_without_blocks_is_refused_in_one_sentence(dpft, tmp_path):
    code, _, told = dpft(*TWO_STEPS, "--results", tmp_path, "--quiet", "--recompute")
    assert code == 2 and "has no blocks that could run again; leave out --recompute" in told

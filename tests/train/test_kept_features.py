"""features=kept: what a frozen encoder has for an example is computed once, and changes nothing but time."""

import dataclasses
import shutil

import pytest
from safetensors.torch import load_file, save_file
from small_runs import a_spec, quiet

from dpft.harness.errors import BadInput
from dpft.harness.execution import local
from dpft.harness.execution.progress import Quiet
from dpft.harness.records.store import Store
from dpft.harness.train import held_features, kept_features, run


@pytest.fixture(autouse=True)
def nothing_held(tmp_path, monkeypatch):
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path / "cache"))
    held_features._HELD.clear()
    yield
    held_features._HELD.clear()


@pytest.fixture
def passes(monkeypatch):
    """Examples that went through the encoder for their features."""
    made, features = [], kept_features._Cut.features

    def counted(self, example):
        made.append(example["input_ids"].tobytes())
        return features(self, example)

    monkeypatch.setattr(kept_features._Cut, "features", counted)
    return made


def last_layer(tiny_bert, **more):
    return a_spec("last-layer", tiny_bert, **{"steps": 6, "eval_every": 2, "features": "kept", **more})


def test_the_numbers_are_those_of_features_made_anew(tiny_bert, settings):
    kept, curve = run.execute(last_layer(tiny_bert), settings, quiet)
    anew, other = run.execute(last_layer(tiny_bert, features="anew"), settings, quiet)
    assert kept["status"] == anew["status"] == "done" and kept["run_id"] != anew["run_id"]
    assert a_spec("last-layer", tiny_bert).run_id == a_spec("last-layer", tiny_bert, features="anew").run_id
    assert kept["privacy"]["ledger"] == anew["privacy"]["ledger"]
    assert [row["metric"] for row in curve] == [row["metric"] for row in other]
    assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in other], rel=1e-5)
    assert kept["diagnostics"]["alignment"] == pytest.approx(anew["diagnostics"]["alignment"], rel=1e-4)
    assert kept["cost"]["trainable_parameters"] == anew["cost"]["trainable_parameters"]
    assert kept["cost"]["phase_s"]["features"] > 0 and "features" not in anew["cost"]["phase_s"]
    assert sum(kept["cost"]["peak_bytes"].values()) < sum(anew["cost"]["peak_bytes"].values()) / 2


def test_each_example_is_computed_once_for_all_seeds_and_evaluations(
    tmp_path, tiny_bert, settings, prepared_once, passes
):
    seeds = [last_layer(tiny_bert, seed=seed) for seed in range(3)]
    with prepared_once():
        there = local.run_all(seeds, Store(tmp_path / "there"), settings, local.Policy(), Quiet())
        assert len(passes) == len(set(passes))
        once = len(passes)
        local.run_all(seeds[:1], Store(tmp_path / "more"), settings, local.Policy(), Quiet())
        assert len(passes) == once
        held_features._HELD.clear()
        back = local.run_all(seeds[::-1], Store(tmp_path / "back"), settings, local.Policy(), Quiet())
    assert {r["run_id"]: r["chain"] for r in there} == {r["run_id"]: r["chain"] for r in back}, "whoever came first"


def test_a_run_that_was_cut_short_goes_on_to_the_bit(tmp_path, tiny_bert, settings):
    spec, path = last_layer(tiny_bert), tmp_path / "run.ckpt"
    whole = run.execute(spec, settings, quiet)[0]

    def stops(step, row):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(spec, dataclasses.replace(settings, checkpoint_seconds=0.0), stops, path)
    assert path.exists()
    held_features._HELD.clear()
    assert run.execute(spec, settings, quiet, path)[0]["chain"] == whole["chain"]


def files(tmp_path):
    return sorted((tmp_path / "cache" / "features").glob("*"))


def test_the_next_command_reads_them_from_disk(tmp_path, tiny_bert, settings, passes):
    first = run.execute(last_layer(tiny_bert), settings, quiet)[0]
    assert len(files(tmp_path)) == 1
    held_features._HELD.clear()
    made = len(passes)
    again = run.execute(last_layer(tiny_bert), settings, quiet)[0]
    assert len(passes) == made and again["chain"] == first["chain"] and len(files(tmp_path)) == 1
    held_features._HELD.clear()
    run.execute(last_layer(tiny_bert, seed=1), settings, quiet)
    assert len(passes) == len(set(passes)) > made and len(files(tmp_path)) == 1, "one file has all"
    content = bytearray(files(tmp_path)[0].read_bytes())
    content[-1] ^= 1
    files(tmp_path)[0].write_bytes(content)
    held_features._HELD.clear()
    last = run.execute(last_layer(tiny_bert), settings, quiet)[0]
    assert last["chain"] == first["chain"] and len(passes) > len(set(passes)), "a damaged file is passed over"


def test_features_of_own_rows_stay_off_disk_unless_asked(tmp_path, tiny_bert, settings, monkeypatch):
    from dpft.tasks.glue import Sst2

    monkeypatch.setattr(Sst2, "encoded_on_disk", False)
    run.execute(last_layer(tiny_bert, steps=2), settings, quiet)
    assert not files(tmp_path)
    held_features._HELD.clear()
    monkeypatch.setenv("DPFT_CACHE_OWN", "1")
    run.execute(last_layer(tiny_bert, steps=2), settings, quiet)
    assert len(files(tmp_path)) == 1


def test_another_encoder_has_other_features(tmp_path, tiny_bert, settings, passes):
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 0.9 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    losses = []
    for model in (tiny_bert, other, tiny_bert):
        losses.append(run.execute(last_layer(model, steps=2), settings, quiet)[1][1]["loss"])
    assert len(passes) == 2 * len(set(passes)), "once for each"
    assert losses[0] == losses[2] != losses[1]


def test_what_cannot_be_kept_is_refused(tiny_bert, settings):
    record = run.execute(last_layer(tiny_bert, head="mlm"), settings, quiet)[0]
    assert record["status"] == "error" and "take features=anew" in record["error"], record["error"]
    with pytest.raises(BadInput, match="single examples"):
        last_layer(tiny_bert, unit="user", group_size=2)

"""A GGUF file is unpacked once, and again where what was kept is not what came of it."""

import importlib.metadata
import os
from pathlib import Path

import gguf as library
import numpy
import pytest
import torch

from dpft.harness.errors import CannotRun
from dpft.tasks import causal, gguf, models

WIDTH, LAYERS, INNER, WORDS = 8, 2, 16, ["<unk>", "<s>", "</s>", "a", "b", "ab"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A llama of 2 layers as llama.cpp writes it, and a cache of its own."""
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path / "cache"))
    path, random = tmp_path / "tiny.gguf", numpy.random.default_rng(0)
    writer = library.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        inner = {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        square = dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output"], (WIDTH, WIDTH))
        norms = dict.fromkeys(["attn_norm", "ffn_norm"], (WIDTH,))
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (inner | square | norms).items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "another weight":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / gguf.NOTE).write_text(how)


def test_it_is_unpacked_once_and_again_where_it_is_spoilt(file):
    first, weights = causal.load(file)
    folder, options = gguf.place(file)
    assert options == {}
    words = models.load_tokenizer(file)("ab a")["input_ids"]
    for how in (None, "another weight", "cut short", "no tokenizer", "{}", "not json"):
        if how:
            damage(Path(folder), how)
            models.load_tokenizer(file)
        model, again = causal.load(file)
        assert again == weights, how
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), (how, name)
        assert gguf.place(file) == (folder, {}), how
        assert models.load_tokenizer(file)("ab a")["input_ids"] == words, how
    assert [path.name for path in Path(folder).parent.iterdir()] == [Path(folder).name]  # no scratch left


def test_another_file_under_the_name_is_unpacked_for_itself(file):
    _, weights = causal.load(file)
    content = bytearray(Path(file).read_bytes())
    content[-1] ^= 1
    Path(file).write_bytes(content)
    os.utime(file, ns=(0, 1))
    assert causal.load(file)[1] != weights


def test_a_cache_that_takes_nothing_is_no_error(file, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert causal.load(file)[1] == causal.load(file)[1]
    assert gguf.place(file)[1]


def test_without_the_package_the_sentence_says_what_to_install(file, monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for ask in (causal.load, models.load_tokenizer, causal.load_config):
        with pytest.raises(CannotRun, match="tiny.gguf is read by the package gguf.*pip install gguf"):
            ask(file)

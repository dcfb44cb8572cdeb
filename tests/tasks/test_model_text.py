"""Encoding, prompts, truncation and batches of text."""

import pickle

import pytest
import torch
from model_cases import KINDS, prepared

from dpft.tasks import glue, prompts
from dpft.tasks import models as ours


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind, checkpoints):
    out = prepared(checkpoints[kind], "mean", max_length=20)
    assert out.train_lengths == [len(example["input_ids"]) for example in out.train] and max(out.train_lengths) <= 20
    batch = out.collate(out.train)
    expected = {"input_ids", "attention_mask", "position_ids", "labels"}
    assert set(batch) == expected | ({"token_type_ids"} if kind in ("bert", "roberta", "electra") else set())
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        assert tensor.shape == ((3,) if name == "labels" else (3, max(out.train_lengths)))
    assert batch["attention_mask"].sum(dim=1).tolist() == out.train_lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()
    first = 2 if kind == "roberta" else 0
    assert batch["position_ids"][2, :3].tolist() == [first, first + 1, first + 2]
    if kind == "bert":
        assert batch["token_type_ids"][1].tolist()[:5] == [0, 0, 0, 1, 1]
    empty = out.collate([])
    assert {name: tuple(tensor.shape) for name, tensor in empty.items()} == {
        name: (0,) if name == "labels" else (0, 1) for name in batch
    }
    assert pickle.loads(pickle.dumps(out.collate))(out.train)["input_ids"].equal(batch["input_ids"])


@pytest.mark.parametrize("task", [glue.Sst2, glue.Cola, glue.Mnli, glue.Mrpc], ids=lambda task: task.name)
def test_prompts_read_as_published(task, checkpoints):
    text = {
        "sst2": "<s>it was a long film. It was<mask>.</s>",
        "cola": "<s>it was a long film. This is<mask>.</s>",
        "mnli": "<s>it was a long film?<mask>, it was not great.</s>",
        "mrpc": "<s>it was a long film.<mask>, it was not great.</s>",
    }
    rows = [{"text": "it was a long film.", "pair": "It was not great.", "label": 0}]
    out = prepared(checkpoints["roberta"], "mlm", task=task, rows=rows)
    tokenizer = ours.load_tokenizer(checkpoints["roberta"])
    example = out.train[0]
    assert tokenizer.decode(example["input_ids"], clean_up_tokenization_spaces=False) == text[task.name]
    assert example["input_ids"][example["mask_position"]] == tokenizer.mask_token_id
    assert tokenizer.convert_ids_to_tokens(out.model.words.tolist()) == [f"Ġ{word}" for word in task.label_words]


def test_truncation_keeps_the_mask(checkpoints):
    rows = [
        {"text": "great " * 200, "pair": "film " * 200, "label": 1},
        {"text": "film", "pair": "a " * 90, "label": 0},
    ]
    for kind in ("bert", "roberta"):
        out = prepared(checkpoints[kind], "mlm", rows=rows, max_length=16)
        for example in out.train:
            assert len(example["input_ids"]) == 16 and list(example["input_ids"]).count(4) == 1
            assert example["input_ids"][example["mask_position"]] == 4


def test_shortened_cuts_the_longer_one_and_wastes_nothing():
    for first in range(8):
        for second in range(8):
            for budget in range(1, 17):
                a, b = prompts.shortened([[0] * first, [1] * second], budget)
                assert len(a) + len(b) == min(first + second, budget) and len(a) <= first and len(b) <= second
                assert len(a) == first or len(a) >= budget // 2

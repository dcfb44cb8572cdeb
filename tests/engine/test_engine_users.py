"""Users as examples: one clipped gradient of the mean loss over a user's rows, on every engine and kind of model."""

import image_cases
import pytest
import torch
import transformers as hf
from causal_cases import CONFIGS as LANGUAGE_MODELS
from engine_cases import assert_same, batch_for, check, clipped, loss, model_for, no_clock
from torch.nn import functional as F

from dpft.harness.engine import mixing
from dpft.harness.engine.base import WEIGHTS
from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.train.by_user import Together, mean_loss
from dpft.tasks.digits import Digits

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [3, 1, 2]  # rows of each user


def of_users(batch, sizes=SIZES):
    """The rows of a batch dealt out to users, one after the other."""
    rows = [{key: value[i] for key, value in batch.items()} for i in range(sum(sizes))]
    owned = [[rows.pop(0) for _ in range(size)] for size in sizes]
    stacked = lambda examples: {key: torch.stack([e[key] for e in examples]) for key in batch}  # noqa: E731
    return Together(stacked)(owned, 0)


def token_loss(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (F.cross_entropy(logits.mT, batch["input_ids"], reduction="none") * batch["attention_mask"]).sum(1)


def model_and_rows(kind):
    """(model, loss, six rows); positions are looked up once for the whole batch where the architecture does so."""
    if kind in image_cases.CONFIGS:
        return image_cases.model_of(kind), Digits().loss, image_cases.batch_of(6, 1, 32 if kind == "resnet" else 8)
    if kind in LANGUAGE_MODELS:
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(LANGUAGE_MODELS[kind]).double().eval()
        rows = batch_for("roberta", 6, 7)
        return model, token_loss, {**rows, "input_ids": rows["input_ids"] % 30}
    rows = batch_for(kind, 6)
    return model_for(kind), loss, {key: value for key, value in rows.items() if key != "position_ids"}


KINDS = ["bert", "roberta", "distilbert", "electra", "gpt2", "opt", "llama-tied", "qwen3", "vit", "resnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_is_one_example_to_the_factored_engine(kind):
    """Against autograd of each user alone, users of 3, 1 and 2 rows padded to 3, positions looked up once."""
    model, loss, rows = model_and_rows(kind)
    check(model, mean_loss(loss), of_users(rows))


@pytest.mark.parametrize("engine", ["factored", "reference", "opacus"])
def test_a_users_gradient_is_the_mean_of_its_rows_clipped_once(engine):
    """By the rows' own gradients, which know of no users; a row that pads adds nothing."""
    model, loss, rows = model_and_rows("vit" if engine == "opacus" else "bert")
    batch, expected = of_users(rows), {}
    assert batch[WEIGHTS].tolist() == [pytest.approx(w) for w in ([1 / 3] * 3, [1, 0, 0], [0.5, 0.5, 0])]
    parameters = dict(model.named_parameters())
    first = 0
    for size in SIZES:
        own = {key: value[first : first + size] for key, value in rows.items()}
        gradients = torch.autograd.grad(loss(model, own).mean(), list(parameters.values()), allow_unused=True)
        first += size
        found = {
            n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients, strict=True)
        }
        norm = torch.sqrt(sum(g.square().sum() for g in found.values()))
        for name, g in found.items():
            expected[name] = expected.get(name, 0) + g * min(1.0, 0.7 / float(norm))
    total, _, norms = clipped(engine, model, batch, 0.7, loss=mean_loss(loss))
    assert norms.shape == (3, 1)
    assert_same(total, expected, 1e-6)  # the weights are fp32


def test_users_that_mix_are_seen_through_an_embedding():
    """The probe of derivatives knows that a user has several rows: here each row sees the next one, of another user, too."""
    model, loss, rows = model_and_rows("bert")
    batch = of_users({key: value[:4] for key, value in rows.items()}, [2, 2])

    def engine_of(loss):
        return FactoredEngine(model, mean_loss(loss), dict(model.named_parameters()), no_clock)

    assert mixing.depends_on_others(engine_of(loss), batch) is None
    found = mixing.depends_on_others(engine_of(lambda m, b: loss(m, b) + loss(m, b).roll(1)), batch)
    assert found is not None and "embeddings" in found

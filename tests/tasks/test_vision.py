"""Image tasks, their models, public pretraining, and several views of one example as one example."""

import copy
import io
import json

import numpy
import polars
import pytest
import torch
import transformers as hf
from engine_cases import check, no_clock
from image_cases import BODY, CONFIGS, batch_of, model_of
from small_runs import quiet

from dpft.harness.engine import engine_class
from dpft.harness.engine.base import zero_sums
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.settings import Settings
from dpft.tasks import batchnorm, digits, imagesets, models, pretraining
from dpft.tasks.base import ModelSpec
from dpft.tasks.handwriting import PRIVATE, PUBLIC, of_classes
from dpft.tasks.pixels import Collator, Form

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size, views", [(3, 1), (1, 3), (2, 2), (4, 3)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_several_views_are_one_example_to_every_engine(kind, size, views):
    """Against per-example autograd in float64; the loss averages over views before the one gradient is clipped."""
    model = model_of(kind, views)
    check(model, digits.Digits().loss, batch_of(size, views, 32 if kind in ("resnet", "bottleneck") else 8))


def test_the_gradient_of_an_example_is_the_mean_over_its_views():
    model, batch = model_of("vit", 3), batch_of(2, 3)
    parameters = dict(model.named_parameters())
    engine = engine_class("factored")(model, digits.Digits().loss, parameters, no_clock)
    total = zero_sums(parameters, {})
    engine.accumulate(batch, total, 1e9, {})
    engine.close()
    by_view = torch.zeros_like(total["model.classifier.weight"])
    for example in range(2):
        for view in range(3):
            scores = model(batch["pixel_values"][example, view][None])
            loss = torch.nn.functional.cross_entropy(scores, batch["labels"][example][None]) / 3
            by_view += torch.autograd.grad(loss, model.model.classifier.weight)[0]
    assert torch.allclose(total["model.classifier.weight"], by_view, rtol=1e-10)


# --- models


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Local checkpoints as the hub has them: a ViT, and a ResNet with BatchNorm that has run on some batches."""
    root = tmp_path_factory.mktemp("vision")
    for kind in ("vit", "resnet"):
        torch.manual_seed(0)
        model = hf.AutoModelForImageClassification.from_config(CONFIGS[kind])
        if kind == "resnet":
            model.train()(pixel_values=torch.randn(4, 3, 32, 32))
        model.save_pretrained(root / kind)
    form = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 1.0]}
    (root / "resnet/preprocessor_config.json").write_text(json.dumps(form))
    return root


def test_batch_norm_is_refused_or_converted_with_its_weights(folders):
    with pytest.raises(CannotRun, match="BatchNorm2d at .* mixes examples.*batch_norm=group"):
        models.load_model(str(folders / "resnet"), "native", 4, torch.Generator(), batch_norm="refuse")
    model, _ = models.load_model(str(folders / "resnet"), "native", 4, torch.Generator(), batch_norm="group")
    original = hf.AutoModelForImageClassification.from_pretrained(folders / "resnet")
    norms = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert len(norms) == 8 and {m.num_groups for m in norms.values()} == {2, 4}
    assert all(torch.equal(m.weight, original.get_submodule(n).weight) for n, m in norms.items())
    assert model.head_parameters == ["model.classifier.1.weight", "model.classifier.1.bias"]
    assert model.model.classifier[1].out_features == 4


def test_what_only_pretraining_masks_with_is_not_trained(tmp_path):
    """DINOv2's mask token: no image reaches it, and a run that trained it was refused."""
    hf.AutoModelForImageClassification.from_config(hf.Dinov2Config(**BODY, num_labels=3)).save_pretrained(tmp_path)
    model, _ = models.load_model(str(tmp_path), "native", 3, torch.Generator(), batch_norm="refuse")
    assert not any("mask_token" in name for name, _ in model.named_parameters())
    check(model.double(), digits.Digits().loss, batch_of(3, 1))


def frozen(folders):
    """The ResNet with its statistics, moved off what they were made of so that they matter."""
    model, _ = models.load_model(str(folders / "resnet"), "native", 3, torch.Generator(), batch_norm="frozen")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double(), norms


def test_frozen_batch_norm_is_exact_on_both_engines_and_stays_as_it_is(folders):
    torch.manual_seed(0)
    model, norms = frozen(folders)
    before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    assert len(norms) == 8 and all(bool(m.running_mean.any()) for m in norms), "it has run on some batches"
    assert model.train().training and not any(m.training for m in norms)
    assert all(m.weight.requires_grad and m.bias.requires_grad for m in norms), "scale and shift train"
    check(model, digits.Digits().loss, batch_of(4, 1, 32))
    for m, kept in zip(norms, before, strict=True):
        assert all(map(torch.equal, (m.running_mean, m.running_var, m.num_batches_tracked), kept))
    copied = [m for m in copy.deepcopy(model).train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(m.training for m in copied)


def test_a_run_with_frozen_batch_norm_trains_all_but_its_statistics(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(
        batchnorm, "freeze", lambda model, source, freeze=batchnorm.freeze: seen.append(model) or freeze(model, source)
    )
    spec = a_run(model=str(folders / "resnet"), batch_norm="frozen")
    record, _ = run.execute(spec, Settings(), quiet)
    assert record["status"] == "done", record["error"]
    old = hf.AutoModelForImageClassification.from_pretrained(folders / "resnet")
    norms = {n: m for n, m in seen[-1].named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for name, module in norms.items():
        was = old.get_submodule(name)
        assert torch.equal(module.running_mean, was.running_mean) and torch.equal(module.running_var, was.running_var)
        assert not torch.equal(module.weight, was.weight) and not torch.equal(module.bias, was.bias)


def test_batch_norm_without_statistics_cannot_be_frozen():
    holder = torch.nn.Sequential(torch.nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(CannotRun, match="without statistics at 0; convert it"):
        batchnorm.freeze(holder, "the model")


@pytest.mark.parametrize("channels, groups", [(1, 1), (4, 1), (16, 4), (20, 1), (24, 2), (64, 16), (2048, 32)])
def test_groups_divide_the_channels_and_have_at_least_four(channels, groups):
    """With one channel to a group a 1x1 image would be normalised to zero."""
    holder = torch.nn.Sequential(torch.nn.BatchNorm2d(channels))
    batchnorm.convert(holder)
    assert holder[0].num_groups == groups and channels % groups == 0


def test_images_take_the_form_the_model_wants(folders):
    config = hf.AutoConfig.from_pretrained(folders / "resnet")
    form = Form.of(str(folders / "resnet"), config)
    assert (form.size, form.mean, form.std, form.tokens) == ((32, 32), (0.1, 0.2, 0.3), (0.5, 0.5, 1.0), 64)
    grey = numpy.full((1, 8, 8), 51, "uint8")
    batch = Collator(form)([{"image": grey, "label": 2}])
    expected = (0.2 - torch.tensor(form.mean)) / torch.tensor(form.std)
    assert torch.allclose(batch["pixel_values"], expected.view(1, 3, 1, 1).expand(1, 3, 32, 32), atol=1e-6)
    assert batch["labels"].tolist() == [2] and Collator(form)([])["pixel_values"].shape == (0, 3, 32, 32)
    vit = Form.of(str(folders / "vit"), hf.AutoConfig.from_pretrained(folders / "vit"))
    assert (vit.size, vit.tokens, vit.mean) == ((8, 8), 4, (0.5, 0.5, 0.5))


# --- data


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def image_mirror(root, task, counts=(5, 3), label=None, content=None):
    folder = root / task.hub
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.Generator(numpy.random.PCG64(0))
    shape = (12, 10, 3) if task.channels == 3 else (12, 10)
    for split, count in zip(("train", "test"), counts, strict=True):
        images = [random.integers(0, 256, shape).astype("uint8") for _ in range(count)]
        cells = [{"bytes": png(i) if content is None else content, "path": None} for i in images]
        labels = [k % task.classes if label is None else label for k in range(count)]
        polars.DataFrame({task.columns[0]: cells, task.columns[1]: labels}).write_parquet(folder / f"{split}.parquet")
    return images


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_image_sets_from_a_mirror(name, tmp_path):
    task = registry.task(name)
    images = image_mirror(tmp_path, task)
    data = task().load(tmp_path)
    assert (task().train_size(tmp_path), len(data.train), len(data.validation)) == (5, 5, 3)
    assert task().train_size(None) == task.train_rows
    for row, image in zip(data.validation, images, strict=True):
        assert numpy.array_equal(row["image"], image.transpose(2, 0, 1) if task.channels == 3 else image[None])
    assert [row["index"] for row in data.train] == list(range(5))
    assert data.fingerprint == task().load(tmp_path).fingerprint


def test_bad_image_sets_are_refused_in_one_sentence(tmp_path):
    task = imagesets.Mnist
    with pytest.raises(CannotRun, match="has no file .*ylecun/mnist/mnist/train.parquet"):
        task().load(tmp_path)
    for more, message in (
        ({"counts": (0, 1)}, "has no rows"),
        ({"label": 10}, "the label 10 in row 0; mnist knows 0 to 9"),
        ({"content": b"no image"}, "The image in row 0 of .* cannot be decoded"),
    ):
        image_mirror(tmp_path, task, **more)
        with pytest.raises(CannotRun, match=message):
            task().load(tmp_path)
    polars.DataFrame({"label": [1]}).write_parquet(tmp_path / task.hub / "train.parquet")
    with pytest.raises(CannotRun, match="no column image"):
        task().load(tmp_path)


def test_digits_keep_the_public_classes_apart():
    data = digits.Digits().load(None)
    assert len(data.train) == digits.Digits().train_size(None) == 800 and len(data.validation) == 277
    labels = [row["label"] for row in data.validation]
    assert max(labels.count(k) for k in range(6)) / 277 == pytest.approx(digits.Digits.chance, abs=5e-4)
    private = {row["image"].tobytes() for row in [*data.train, *data.validation]}
    public, _ = of_classes(PUBLIC)
    assert len(private) == 1077 and len(public) == 720 and not private & {image.tobytes() for image in public}
    assert set(PUBLIC) | set(PRIVATE) == set(range(10)) and "0 to 3" in digits.Digits.description


# --- public pretraining


def test_pretraining_is_deterministic_kept_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path))
    monkeypatch.setattr(pretraining, "EPOCHS", 1)
    path = pretraining.folder("digits-resnet")
    weights = (tmp_path / "pretrained").glob("*/model.safetensors")
    (file,) = weights
    first = file.read_bytes()
    monkeypatch.setattr(pretraining, "_pretrained", None)
    assert pretraining.folder("digits-resnet") == path, "taken from the cache"
    monkeypatch.undo()
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path))
    monkeypatch.setattr(pretraining, "EPOCHS", 1)
    file.write_bytes(first[:-4] + bytes(4))
    assert pretraining.folder("digits-resnet") == path and file.read_bytes() == first, (
        "damaged, so made again, the same"
    )
    assert [p.name for p in (tmp_path / "pretrained").iterdir()] == [file.parent.name]


# --- runs


def a_run(method="dp-adam", **more):
    small = {"batch_size": 80, "steps": 3, "eval_every": 3, "epsilon": 8.0}
    return resolve({"task": "digits", "method": method, **small, **more})


@pytest.mark.parametrize("model", ["digits-vit", "digits-resnet"])
@pytest.mark.parametrize("views", [1, 2])
def test_runs_on_digits(model, views):
    record, _ = run.execute(a_run(model=model, views=views), Settings(), quiet)
    assert record["status"] == "done", record["error"]
    assert 0 <= record["result"]["final"] <= 1 and record["provenance"]["model_fingerprint"]


def test_views_do_not_depend_on_microbatches_and_change_with_the_step():
    curves = []
    for tokens in (100, 5000):
        record, curve = run.execute(a_run(views=3), Settings(max_tokens=tokens), quiet)
        curves.append([row["loss"] for row in curve])
        assert record["status"] == "done", record["error"]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    task, generator = digits.Digits(), torch.Generator().manual_seed(0)
    prepared = task.prepare(task.load(None), ModelSpec("digits-vit", "native", 1, views=4), generator)
    few = prepared.train[:3]
    first, again, later = (prepared.train_collate(few, step)["pixel_values"] for step in (0, 0, 1))
    alone = prepared.train_collate(few[1:2], 0)["pixel_values"]
    assert first.shape == (3, 4, 1, 8, 8) and torch.equal(first, again) and torch.equal(first[1:2], alone)
    assert not torch.equal(first, later) and prepared.train_lengths[0] == 4 * prepared.validation_lengths[0]


def test_settings_of_images_are_refused_for_texts_and_others_for_images():
    for more in ({"views": 2}, {"batch_norm": "group"}):
        with pytest.raises(BadInput, match="settings of image tasks, which sst2 is not"):
            resolve({"task": "sst2", "method": "dp-adam", **more})
    with pytest.raises(BadInput, match="batch_norm"):
        a_run(batch_norm="keep")
    with pytest.raises(BadInput, match="views must be at least 1"):
        a_run(views=0)
    record, _ = run.execute(a_run(head="mean"), Settings(), quiet)
    assert record["status"] == "error" and "native head only" in record["error"]
    record, _ = run.execute(a_run(model="digits-vti"), Settings(), quiet)
    assert "no image model called 'digits-vti'; did you mean 'digits-vit'" in record["error"]

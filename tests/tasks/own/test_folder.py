"""Task `images`: a folder with a folder for each class."""

import json
import tracemalloc

import numpy
import pytest
import transformers
from image_cases import CONFIGS
from PIL import Image

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs.resolve import resolve
from dpft.tasks.images import fingerprint, rows
from dpft.tasks.own.folder import ImageFolder


@pytest.fixture
def folder(tmp_path):
    """Sixty random images of two classes, 10 x 12 pixels."""
    fill(tmp_path / "pictures", 60)
    return tmp_path / "pictures"


def fill(folder, count, seed=0, classes=("cat", "dog")):
    random = numpy.random.Generator(numpy.random.PCG64(seed))
    for i in range(count):
        path = folder / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 10, 3)).astype("uint8")).save(path)


def task(folder, **more):
    return ImageFolder({"folder": str(folder), **more})


def test_images_classes_and_the_split(folder):
    data = task(folder).load(None)
    assert data.classes == ("cat", "dog") and len(data.train) + len(data.validation) == 60 and data.validation
    assert {row["image"].shape for row in data.train} == {(3, 12, 10)}
    assert [row["index"] for row in data.train] == list(range(len(data.train)))
    before = {row["image"].tobytes() for row in data.validation}
    for path in list(folder.rglob("*.png")):
        path.rename(path.with_name(f"x{path.name}"))
    assert {row["image"].tobytes() for row in task(folder).load(None).validation} == before, "names have no part in it"


def test_folders_of_splits(tmp_path, folder):
    fill(tmp_path / "both/train", 20)
    fill(tmp_path / "both/validation", 6, seed=1)
    data = task(tmp_path / "both").load(None)
    assert (len(data.train), len(data.validation), data.classes) == (20, 6, ("cat", "dog")) and not data.notes[1:]
    (tmp_path / "both/train/cat/0.png").rename(tmp_path / "both/validation/cat/99.png")
    fill(tmp_path / "both/train", 20)
    assert "1 of 7 validation images are in train, too" in task(tmp_path / "both").load(None).notes[-1]
    fill(tmp_path / "classes", 40, classes=("train", "boat"))
    assert task(tmp_path / "classes").load(None).classes == ("boat", "train")


def test_content_is_that_of_names_and_bytes(folder, tmp_path):
    asked = {"task": "images", "method": "last-layer", "folder": str(folder)}
    first = resolve(asked)
    (folder / ".hidden.png").write_bytes(b"x"), (folder / "notes.txt").write_text("x")
    assert resolve(asked) == first
    (folder / "cat/0.png").rename(folder / "dog/0.png")
    assert resolve(asked).run_id != first.run_id
    (folder / "dog/0.png").rename(folder / "cat/0.png")
    assert resolve(asked) == first
    folder.rename(tmp_path / "moved")
    assert (
        resolve({**asked, "folder": str(tmp_path / "moved")}).task_options["content"] == first.task_options["content"]
    )


def test_images_of_several_sizes_need_one(folder):
    Image.new("L", (30, 20), 9).save(folder / "cat/other.jpg")
    with pytest.raises(CannotRun, match="other.jpg has 30 x 20 pixels and .*0.png has 10 x 12; .* --set size=224"):
        task(folder).load(None)
    assert {row["image"].shape for row in task(folder, size=8).load(None).train} == {(3, 8, 8)}


def test_pixels_are_not_kept(tmp_path):
    """The fingerprint is that of all pixels held at once; of forty images at no time more than a few are held."""
    for i in range(40):
        path = tmp_path / "large" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (160, 160), (i, 2 * i, 3 * i)).save(path)
    task(tmp_path / "large", validation="0.3").load(None)  # now its libraries are imported
    tracemalloc.start()
    data = task(tmp_path / "large", validation="0.4").load(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    both = data.train, data.validation
    pixels = sum(row["image"].nbytes for part in both for row in part)
    assert pixels == 40 * 160 * 160 * 3 and peak < pixels / 4
    whole = [rows([row["image"] for row in part], [row["label"] for row in part]) for part in both]
    assert data.fingerprint == fingerprint(*whole)
    with pytest.raises(KeyError):
        data.train[0]["text"]


def test_an_image_that_changes_in_the_middle_of_a_run_is_named(folder):
    data = task(folder).load(None)
    Image.new("RGB", (10, 12)).save(folder / "cat/0.png")
    with pytest.raises(CannotRun, match="cat/0.png has changed since it was first read"):
        [row["image"] for row in [*data.train, *data.validation]]


def test_pictures_are_turned_upright(folder):
    turned = Image.new("RGB", (12, 10))
    turned.getexif()[274] = 6
    turned.save(folder / "cat/turned.jpg", exif=turned.getexif())
    assert {row["image"].shape for row in task(folder).load(None).train} == {(3, 12, 10)}


def spoil(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("cat/torn.png", "The image in .*cat/torn.png cannot be decoded"),
        ("beside.png", "beside.png does not lie as <class>/<image>"),
        ("cat/deep/er.png", "cat/deep/er.png does not lie as <class>/<image>"),
    ],
)
def test_a_bad_image_is_named(name, complaint, folder):
    good = (folder / "cat/0.png").read_bytes()
    spoil(folder, name, good[:-40] if "torn" in name else good)
    with pytest.raises(CannotRun, match=complaint):
        task(folder).load(None)


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"folder": ""}, "needs a folder with a folder for each class"),
        ({"folder": "nowhere"}, "nowhere does not exist"),
        ({"validation": "held"}, "must be a share between 0 and 1, not held"),
        ({"size": -1}, "size must be 0 or a number of pixels"),
    ],
)
def test_settings_that_cannot_work(more, complaint, folder):
    with pytest.raises(BadInput, match=complaint):
        resolve({"task": "images", "method": "last-layer", "folder": str(folder), **more})


def test_an_empty_folder_and_a_single_class(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(CannotRun, match="holds no .png, .jpg, .jpeg files"):
        task(tmp_path / "none").load(None)
    fill(tmp_path / "one", 30, classes=("cat",))
    with pytest.raises(CannotRun, match="All labels of .* are 'cat'"):
        task(tmp_path / "one").load(None)


def test_runs_to_a_record_that_verifies(folder, tmp_path, dpft):
    transformers.AutoModelForImageClassification.from_config(CONFIGS["vit"]).save_pretrained(tmp_path / "vit")
    command = [
        "run",
        "--task",
        "images",
        "--set",
        f"folder={folder}",
        "--model",
        tmp_path / "vit",
        "--method",
        "last-layer",
    ]
    command += ["--steps", 2, "--batch-size", 20, "--results", tmp_path / "runs", "--json"]
    code, out, err = dpft(*command)
    assert code == 0, err
    assert json.loads(out)[0]["result"]["all_metrics"].keys() == {"accuracy", "macro_f1"}
    assert dpft("verify", tmp_path / "runs")[0] == 0
    shown = dpft("describe", "images", "--set", f"folder={folder}")[1]
    assert "0: cat" in shown and "uint8 array of 3 x 12 x 10" in shown

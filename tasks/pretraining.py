"""Small image models pretrained on the public classes of `digits`, because no pretrained weights of images come in packages.

They are made once, in under a minute on one core, and kept in the cache. One thread and fixed seeds: the same torch on the same
kind of processor gives the same bits, and a record's model fingerprint says which bits they were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.cache import cache_dir
from dpft.harness.errors import CannotRun, unknown
from dpft.tasks import folders, model_sources
from dpft.tasks.downloads import sha256_hex, sha256_of
from dpft.tasks.handwriting import PUBLIC, of_classes
from dpft.tasks.hub import Fetch

if TYPE_CHECKING:
    from torch import nn

MODELS: dict[str, dict[str, Any]] = {
    "digits-vit": {
        "model_type": "vit",
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "digits-resnet": {
        "model_type": "resnet",
        "image_size": 16,
        "num_channels": 1,
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
        "dpft_norm": "group",  # its normalisation layers are GroupNorm
    },
}
EPOCHS, BATCH, LR = 30, 64, 2e-3
FORM = {"image_mean": [0.5], "image_std": [0.5]}


def resolve(name: str) -> str:
    """The folder or hub id that the name of an image model means. Raises CannotRun for an unknown name, with the nearest one."""
    from dpft.tasks import models

    if name in MODELS:
        return folder(name)
    if "/" not in name and not Path(name).expanduser().is_dir():
        raise CannotRun(f"{unknown('image model', name, MODELS)} Or give a local folder or a hub id.")
    return models.resolve(name)


def folder(name: str) -> str:
    """The folder of a pretrained model of MODELS, made if it is not there or not what was written.

    Raises CannotRun when the cache folder cannot be written.
    """
    path, text = _place(name)
    if not _intact(path, text):
        _write(path, text, _pretrained(MODELS[name]), name)
    return str(path)


def lacking(name: str) -> list[Fetch]:
    """What must be fetched before the image model called `name` can be loaded, or made here. Raises CannotRun as `resolve`."""
    if name in MODELS:
        make = Fetch(f"the model {name}", "this machine, in under a minute", lambda: folder(name), remote=False)
        return [] if _intact(*_place(name)) else [make]
    if "/" not in name and not Path(name).expanduser().is_dir():
        resolve(name)  # says what is wrong
    return model_sources.lacking(name)


def _place(name: str) -> tuple[Path, str]:
    """(folder of a model of MODELS, what is written into it of its making)."""
    import torch

    recipe = {"name": name, "config": MODELS[name], "public": PUBLIC, "epochs": EPOCHS, "batch": BATCH, "lr": LR}
    recipe |= {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}
    text = json.dumps(recipe, sort_keys=True)
    return cache_dir() / "pretrained" / f"{name}-{sha256_hex(text.encode())[:16]}", text


def _intact(path: Path, recipe: str) -> bool:
    try:
        stored = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
        return stored["recipe"] == recipe and stored["sha256"] == sha256_of(path / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, CannotRun):
        return False


def _write(path: Path, recipe: str, model: nn.Module, name: str) -> None:
    """In one atomic step: two processes may make it at once, with the same bits."""
    from dpft.tasks.loaders import quiet

    try:
        with folders.made(path, lambda: _intact(path, recipe)) as scratch:
            with quiet():
                model.save_pretrained(scratch)
            size = MODELS[name]["image_size"]
            form = {**FORM, "size": {"height": size, "width": size}}
            (scratch / "preprocessor_config.json").write_text(json.dumps(form))
            (scratch / "recipe.json").write_text(
                json.dumps({"recipe": recipe, "sha256": sha256_of(scratch / "model.safetensors")})
            )
    except OSError as error:
        raise CannotRun(
            f"Cannot write to {path.parent} ({error.strerror}); set DPFT_CACHE to a writable folder."
        ) from error


def _pretrained(config: dict[str, Any]) -> nn.Module:
    """Adam with a linearly falling learning rate, on randomly moved images of the public classes."""
    import numpy
    import torch
    import transformers

    from dpft.tasks.batchnorm import convert
    from dpft.tasks.pixels import Collator, Form, shifted

    images, labels = of_classes(PUBLIC)
    targets = torch.tensor(labels)
    form = Form((config["image_size"],) * 2, 1, tuple(FORM["image_mean"]), tuple(FORM["image_std"]), 1)
    random = numpy.random.Generator(numpy.random.PCG64(0))
    options = {key: value for key, value in config.items() if key != "model_type"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = transformers.AutoConfig.for_model(config["model_type"], num_labels=len(PUBLIC), **options)
            model = transformers.AutoModelForImageClassification.from_config(made)
        convert(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        steps = EPOCHS * (len(images) // BATCH)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
            chosen = random.permutation(len(images))[:BATCH]
            pixels = Collator(form).pixels([shifted(images[i], random, False) for i in chosen])
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()

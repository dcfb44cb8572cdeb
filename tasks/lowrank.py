"""Task `low-rank`: a linear map whose gradient has four singular values, so that spectral theory can be checked against it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, ModelSpec, Prepared, Task

if TYPE_CHECKING:
    import evaluate
    import numpy
    import torch
    from torch import nn

SIZE, TRAIN, VALIDATION, PUBLIC = 256, 20_000, 256, 512
SINGULAR_VALUES = (1.0, 0.7, 0.5, 0.35)
FEATURES = 64  # of the model `layers`


class LowRank(Task):
    """Find W* of rank 4 (256 x 256) from pairs (x, W* x), x standard normal, by least squares from W = 0.

    The gradient of an example at W is (W - W*) x x^T: at the start its columns lie in the four-dimensional column space of W*,
    and so do those of every clipped sum. No label noise: what a release holds beyond rank 4 is the mechanism's noise.
    """

    name = "low-rank"
    version = 1
    kind = "regression"
    description = "synthetic: a 256 x 256 linear map of rank 4; its gradient is low-rank by construction"
    source = "drawn from a fixed seed; for checking the theory of Benaych-Georges and Nadakuditi, arXiv:1103.2221"
    metric = "r2"
    chance = 0.0
    threshold = 0.5
    public = "pairs of another map, whose column space it shares half of"
    default_model = "linear"
    default_head = "native"
    default_max_length = 1

    def train_size(self, data_dir: Path | None) -> int:
        """Number of training pairs; a constant."""
        return TRAIN

    def fingerprint(self, data_dir: Path | None) -> None:
        """None: the pairs are drawn from a fixed seed, and their last bits are the processor's."""
        return None

    def load(self, data_dir: Path | None) -> Data:
        """Draw the pairs."""
        import numpy

        generator = numpy.random.Generator(numpy.random.PCG64(1103_2221))
        inputs, targets = _pairs(TRAIN + VALIDATION, generator, _factors(generator))
        rows = [{"inputs": x, "targets": y} for x, y in zip(inputs, targets, strict=True)]
        digest = hashlib.sha256(inputs.tobytes() + targets.tobytes()).hexdigest()
        return Data(rows[:TRAIN], rows[TRAIN:], digest)

    def public_rows(self, data_dir: Path | None) -> Sequence[dict]:
        """Pairs of another map of rank 4, whose column space shares two of the four directions of W*."""
        import numpy

        generator = numpy.random.Generator(numpy.random.PCG64(1103_2221))
        left, right = _factors(generator)
        other = numpy.random.Generator(numpy.random.PCG64(2))
        mine = _factors(other)
        left, right = (
            numpy.linalg.qr(numpy.hstack([a[:, :2], b[:, 2:]]))[0] for a, b in zip((left, right), mine, strict=True)
        )
        inputs, targets = _pairs(PUBLIC, other, (left, right))
        return [{"inputs": x, "targets": y} for x, y in zip(inputs, targets, strict=True)]

    def bare_model(self, spec: ModelSpec) -> nn.Module:
        """The model itself: it is small."""
        return self._model(spec.model)[0]

    def _model(self, name: str) -> tuple[nn.Module, str]:
        models = {self.default_model: _linear, "layers": _layers}
        if name not in models:
            raise CannotRun(f"The task {self.name} has a model of its own, not {name!r}; leave model out.")
        return models[name]()

    def prepare(self, data: Data, spec: ModelSpec, generator: torch.Generator) -> Prepared:
        """`linear`: one layer at zero. `layers`: 64 random features and a head at zero, for methods that train biases or heads.

        Raises CannotRun for another model.
        """
        model, fingerprint = self._model(spec.model)
        return Prepared(
            model=model,
            train=data.train,
            validation=data.validation,
            train_lengths=[1] * len(data.train),
            validation_lengths=[1] * len(data.validation),
            collate=_collate,
            data_fingerprint=data.fingerprint,
            model_fingerprint=fingerprint,
            public=data.public,
        )

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Half the squared error of each example, [batch]."""
        error = model(batch["inputs"]).float() - batch["targets"]
        return error.square().sum(1) / 2

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
        """(outputs, targets), a list of 256 numbers each."""
        return model(batch["inputs"]).float().tolist(), batch["targets"].tolist()

    def make_metric(self) -> evaluate.Metric:
        """`r2`: the share of the targets' variance that is explained, over all outputs together."""
        from dpft.tasks.metrics import make_r2

        return make_r2()


def _factors(generator: numpy.random.Generator) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Orthonormal columns, twice [256, 4]."""
    import numpy

    left, right = (numpy.linalg.qr(generator.standard_normal((SIZE, len(SINGULAR_VALUES))))[0] for _ in "lr")
    return left, right


def _pairs(
    count: int, generator: numpy.random.Generator, factors: tuple[numpy.ndarray, numpy.ndarray]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(inputs, targets), float32 [count, 256] each."""
    left, right = factors
    inputs = generator.standard_normal((count, SIZE)).astype("float32")
    return inputs, ((inputs @ right) * SINGULAR_VALUES @ left.T).astype("float32")


def _linear() -> tuple[nn.Module, str]:
    from torch import nn

    class Linear(nn.Module):
        head_parameters: tuple[str, ...] = ()

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(SIZE, SIZE, bias=False)
            nn.init.zeros_(self.linear.weight)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs)

    return Linear(), hashlib.sha256(b"zeros").hexdigest()


def _layers() -> tuple[nn.Module, str]:
    """Features with a bias, drawn from a fixed seed as a pretrained body would be, and a linear head at zero."""
    import numpy
    import torch
    from torch import nn

    weights = (
        numpy.random.Generator(numpy.random.PCG64(2)).standard_normal((FEATURES, SIZE)).astype("float32") / SIZE**0.5
    )

    class Layers(nn.Module):
        head_parameters: tuple[str, ...] = ("head.weight", "head.bias")

        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(SIZE, FEATURES), nn.Linear(FEATURES, SIZE)
            with torch.no_grad():
                self.features.weight.copy_(torch.from_numpy(weights))
            for parameter in (self.features.bias, *self.head.parameters()):
                nn.init.zeros_(parameter)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.features(inputs)))

    return Layers(), hashlib.sha256(weights.tobytes()).hexdigest()


def _collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    import numpy
    import torch

    empty = numpy.zeros((0, SIZE), "float32")
    return {
        key: torch.from_numpy(numpy.stack([e[key] for e in examples]) if examples else empty)
        for key in ("inputs", "targets")
    }

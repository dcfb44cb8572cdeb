"""The privacy boundary: a clipped sum goes in, a NoisySum comes out, and only `answer.py` may ask for it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dpft.harness.engine.fakes import has_values
from dpft.harness.errors import CannotRun
from dpft.harness.privacy import Release
from dpft.harness.privacy.calibration import Noise
from dpft.harness.privacy.noise_kinds import law_of, of_one_number
from dpft.harness.privacy.scale_law import Term
from dpft.harness.privacy.shares import noise_multiplier
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.query.queries import Query
from dpft.harness.train.correlated import Correlated
from dpft.harness.train.noise import Source, endless_laplace, gamma
from dpft.harness.train.old_noise import LegacyStream

BESIDE = "(beside)"  # of a sum: the numbers that share the gradient's ball; no parameter is called so


class Mechanism:
    """Adds noise with standard deviation noise_multiplier * clip_norm to every coordinate of a sum with L2 sensitivity clip_norm.

    What noise, `noise` says (harness/privacy/noise_kinds.py); None releases the sum as it is (non-private runs only). source:
    where the draws come from (harness/train/noise.py), in the order of the names. bands: of how many steps the noise is
    correlated (harness/train/correlated.py); the sum of a step then has more noise, and that of many steps less.
    """

    def __init__(self, noise: Noise | None, clip_norm: float, expected_batch_size: int, source: Source, bands: int = 1):
        self.noise = noise
        self.noise_multiplier = 0.0 if noise is None else noise.noise_multiplier
        self.clip_norm = clip_norm
        self.expected_batch_size = expected_batch_size
        self._source = source if bands == 1 or noise is None else Correlated(source, bands)

    def release(
        self, clipped_sum: dict[str, torch.Tensor], clip_norm: float | None = None, share: float = 1.0
    ) -> NoisySum:
        """The noisy sum over the expected batch size. Works in place: `clipped_sum` holds no clean values afterwards.

        clip_norm: the bound of this sum; None: the run's. share: of the step's budget; one with a smaller share has more noise.
        """
        size, bound = self.expected_batch_size, self.clip_norm if clip_norm is None else clip_norm
        multiplier = self._multiplier(share)
        if not all(map(has_values, clipped_sum.values())):
            self._source.room(list(clipped_sum.values()))  # fakes have nothing that noise could be added to
        elif self.noise is not None:
            self._check(clipped_sum)
            if of_one_number(self.noise.mechanism, self.noise.parameters):
                draw = self._scale(multiplier) * bound * endless_laplace(lambda: float(self._source.uniform()[0]))
                for tensor in clipped_sum.values():  # one number in all
                    tensor.copy_((tensor.double() + draw) / size)
            else:
                kind = "laplace" if self._shape == "coordinates" else "gaussian"
                self._source.add(list(clipped_sum.values()), self._scale(multiplier) * bound, size, kind)
        else:
            torch._foreach_div_(list(clipped_sum.values()), size)
        tensors = dict(clipped_sum)
        beside = tensors.pop(BESIDE, None)
        return NoisySum(tensors, multiplier * self._source.spread, bound, size, beside)

    def entries(self, shares: Mapping[str, float]) -> list[Release]:
        """What the ledger is told of the releases of one step, by name, with their shares of the budget."""
        return [
            self.noise.entry(name) if share == 1 else Release(name=name, noise_multiplier=self._multiplier(share))
            for name, share in shares.items()
        ]

    def _multiplier(self, share: float) -> float:
        if share != 1 and self._shape != "gaussian":
            raise RuntimeError("Only Gaussian noise can be shared between the releases of a step.")
        return noise_multiplier(self.noise_multiplier, share)

    @property
    def _shape(self) -> str:
        return "gaussian" if self.noise is None else self.noise.parameters.get("shape", "gaussian")

    def _scale(self, multiplier: float) -> float:
        """What the standard draws of a release are multiplied by, in units of its bound."""
        if self._shape == "gaussian":
            return multiplier
        if self._shape == "coordinates":
            return self.noise_multiplier / math.sqrt(2)  # the variance of Laplace(b) is 2 b^2
        noise = self.noise
        law = law_of(noise.mechanism, noise.noise_multiplier, noise.parameters)
        inverse = sum(draw_term(term, self._source) for term in law.terms)
        return math.sqrt(2 * _gamma((noise.parameters["dimension"] + 1) / 2, self._source)) / inverse

    def _check(self, clipped_sum: dict[str, torch.Tensor]) -> None:
        """Spherical noise is certified for one dimension: with fewer coordinates than booked it would protect less.

        Pure epsilon is certified for one number.
        """
        booked, found = self.noise.parameters.get("dimension"), sum(t.numel() for t in clipped_sum.values())
        if booked not in (None, found):
            raise RuntimeError(f"The release has {found} coordinates, but its noise was certified for {booked}.")

    def asked(self, asker: str, queries: Mapping[str, Query]) -> None:
        """Before the noise of a step is drawn. Raises CannotRun for a question whose noise cannot go with earlier noise."""
        if isinstance(self._source, Correlated):
            self._source.same_space(asker, queries)

    def stepped(self, asker: str, steps: int) -> None:
        """After `steps` steps. Raises CannotRun where correlated noise was not drawn once in each."""
        if isinstance(self._source, Correlated) and self._source.made != steps:
            raise CannotRun(
                f"{asker} does not ask once in every step, so their noise cannot be correlated; leave out bands."
            )

    def kept(self) -> dict[str, torch.Tensor]:
        """Earlier noise that later noise depends on, for a checkpoint."""
        return self._source.kept() if isinstance(self._source, Correlated) else {}

    def set_kept(self, kept: Mapping[str, torch.Tensor], device: torch.device) -> None:
        if isinstance(self._source, Correlated):
            self._source.set_kept(kept, device)

    def state(self) -> torch.Tensor:
        """Where the source is, for a checkpoint."""
        return self._source.state()

    def set_state(self, state: torch.Tensor) -> None:
        self._source.set_state(state)

    def close(self) -> None:
        """End the source's threads."""
        self._source.close()


class GaussianMechanism(Mechanism):
    """Adds N(0, (noise_multiplier * clip_norm)^2); 0 releases the sum as it is."""

    def __init__(self, noise_multiplier: float, clip_norm: float, expected_batch_size: int, source: Source):
        noise = Noise("gaussian", noise_multiplier) if noise_multiplier > 0 else None
        super().__init__(noise, clip_norm, expected_batch_size, source)


def draw_term(term: Term, source: Source) -> float:
    """One draw of a term of a scale law; its numbers mean what harness/privacy/scale_law.py says (a rate is a rate)."""
    first, last = term.values[0], term.values[-1]
    if term.kind == "constant":
        return term.weight * first
    if term.kind == "gamma":
        return term.weight * last * _gamma(first, source)
    if isinstance(source, LegacyStream):
        one = torch.empty((), dtype=torch.float64, device=source.generator.device)
        if term.kind == "exponential":
            return term.weight * float(one.exponential_(lambd=first, generator=source.generator))
        return term.weight * (first + (last - first) * float(one.uniform_(generator=source.generator)))
    uniform = float(source.uniform()[0])
    if term.kind == "exponential":
        return term.weight * -math.log(uniform) / first
    return term.weight * (first + (last - first) * uniform)


def _gamma(shape: float, source: Source) -> float:
    """One Gamma(shape) draw of scale 1."""
    if isinstance(source, LegacyStream):
        one = torch.full((), shape, dtype=torch.float64, device=source.generator.device)
        return float(torch._standard_gamma(one, generator=source.generator))
    return gamma(lambda: source.uniform()[0], shape)

"""The engine on Opacus's grad samplers: per-example gradients by hooks, materialised."""

from contextlib import contextmanager

import torch

from dpft.harness.engine.base import Engine, rows_each, unused
from dpft.harness.errors import CannotRun


class OpacusEngine(Engine):
    """Opacus `GradSampleHooks` (strict=False), for comparison; holds batch x parameters floats."""

    name = "opacus"

    def __init__(self, model, loss, parameters, clock, clipping=None):
        super().__init__(model, loss, parameters, clock, clipping)
        from opacus.grad_sample import GradSampleHooks

        try:
            self.hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)
        except Exception as error:
            raise CannotRun(
                f"Opacus cannot hook this model ({error}); mend what it names or use --engine factored."
            ) from error
        self.hooks.disable_hooks()

    def accumulate(self, batch, total, bound, encodings):
        with self._listening():
            losses = self._passes(batch)
        with self.clock("clip"):
            each = rows_each(self.model, batch)
            samples = {name: self._take(name, p, len(losses), each) for name, p in self.parameters.items()}
            for name, encoding in encodings.items():
                samples[name] = encoding.finished(encoding.dense(samples[name]))
            squares = {name: g.flatten(1).square().sum(1, dtype=torch.float64) for name, g in samples.items()}
            factors, norms = self.clip(squares, bound)
            for name, g in samples.items():
                total[name].add_(torch.einsum("b,b...->...", factors[name].to(g.dtype), g))
        return losses.detach(), norms

    def _passes(self, batch) -> torch.Tensor:
        with self.clock("forward"):
            try:
                losses = self.losses(batch)
            except AttributeError as error:
                if "_forward_counter" not in str(error):  # its hooks count on the parameters
                    raise
                raise CannotRun(
                    "Opacus takes no gradients at other weights than the model's own; use --engine factored or reference."
                ) from error
        with self.clock("backward"):
            try:
                losses.sum().backward()
            except (RuntimeError, ValueError, AttributeError, TypeError) as error:
                if "memory" in str(error):
                    raise
                raise CannotRun(f"Opacus fails on this model ({error}); use --engine factored or reference.") from error
        return losses

    @contextmanager
    def _listening(self):
        """Its hooks note every pass that they see, others' too (a method looks at public examples): but for this time."""
        self.hooks.enable_hooks()
        try:
            yield
        finally:
            self.hooks.disable_hooks()

    def _take(self, name, parameter, batch_size, each):
        sample, used = getattr(parameter, "grad_sample", None), parameter.grad is not None
        parameter.grad_sample = parameter.grad = None
        if sample is None and used:
            raise CannotRun(f"Opacus has no per-example gradients of {name}; freeze it or use --engine reference.")
        if sample is None:
            raise unused(name)
        if not isinstance(sample, list) and each > 1 and len(sample) == batch_size * each:
            sample = sample.unflatten(0, (batch_size, each)).sum(1)
        if isinstance(sample, list) or len(sample) != batch_size:
            raise CannotRun(f"Opacus does not keep the examples of {name} apart; use --engine factored or reference.")
        return sample

    def close(self):
        self.hooks.cleanup()

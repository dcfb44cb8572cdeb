"""What a method asks in a step, and what it makes of an answer, without a run around it."""

from dpft.harness.query.preview import first_questions as first
from dpft.harness.train import core

__all__ = ["answered", "encodings_of", "first"]


def encodings_of(method, parameters, step=0):
    """By parameter: the encodings of the gradient that is asked for first in a step."""
    return core.encodings_of(first(method, step)["gradient"], parameters)


def answered(method, step, *noisy):
    """What `method.step` makes of these releases, which its questions are answered with in their order."""
    left = list(noisy)
    update = method.step(lambda **queries: tuple(left.pop(0) for _ in queries), step)
    assert not left, "it asked for less than there is"
    return update

"""`--ranks`: a command whose runs several processes share."""

from __future__ import annotations

import functools
from collections.abc import Callable


def among_ranks(command: Callable[..., int]) -> Callable[..., int]:
    """A command that is told with `start` how many ranks it is to start, 0 where it is one itself or needs none.

    Of several ranks the first runs the command, and the others the runs that it makes. Raises BadInput for what does not go with
    several.
    """

    @functools.wraps(command)
    def shared(ranks: int | None, **asked) -> int:
        from dpft.harness.execution import launching
        from dpft.harness.train.ranks import place

        one_at_a_time = {
            "--jobs": (asked["jobs"] or 1) > 1,
            "--executor ray": asked["executor"] == "ray",
            "--replay": asked["replay"] is not None,
        }
        launching.refuse(ranks, [name for name, given in one_at_a_time.items() if given], asked["device"])
        launching.refuse_to_part(ranks, asked["shard_model"], asked["engine"])
        try:
            with launching.among(asked["device"]) as served:
                if served:
                    return 0
                return command(start=ranks if place() is None and (ranks or 1) > 1 else 0, **asked)
        except KeyboardInterrupt as stop:
            if not launching.led():
                raise
            return launching.code_of(stop)  # click would print a line for every rank

    return shared

"""One run on several processes ("ranks"): what goes from one to another. `Ranks` itself is a run's only process: nothing does.

Every rank holds the whole model and draws the same batch and the same noise; of the batch each takes its share of the examples.
Clipped sums meet here before any noise is drawn, and leave as one sum that is the same bit for bit on all ranks. So noise is
added once, by everyone alike, and the weights stay the same everywhere.

Whatever is exchanged says first whether a rank has failed: then all fail, with one status and one sentence. Needs no torch.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dpft.harness.errors import CannotRun, RankLost, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MEETING = "DPFT_RANKS_MEET"  # set by `dpft run --ranks`: the file over which the ranks that it starts find one another
WAIT = 3600.0  # seconds that a rank waits for another within a run; one that has died is noticed at once
IDLE = timedelta(days=365)  # between runs nothing may be due for long
FOREVER = math.inf
SLOT = 4096  # bytes of a message that goes in one exchange
PACK = 1 << 22  # numbers that are added in one exchange; a larger tensor goes alone, and needs no copy


class Failed(Exception):
    """A rank has failed, and so the run has: `status` and one sentence, the same on all ranks."""

    def __init__(self, status: str, sentence: str):
        super().__init__(sentence)
        self.status = status


class Ranks:
    """A run in one process.

    Attributes:
        number: which rank this is, from 0; 0 alone writes files and tells what happens.
        count: how many there are.
    """

    number, count = 0, 1
    _parts: Sequence[torch.Tensor] = ()

    @property
    def first(self) -> bool:
        return self.number == 0

    def everyones(self, value: T) -> list[T]:
        """What every rank calls this with, by number; all must call it. Raises Failed where one has called `failed` instead."""
        return [value]

    def failed(self, status: str, sentence: str) -> tuple[str, str]:
        """Instead of the next exchange: this rank has failed. Returns status and sentence that all ranks end with."""
        return status, sentence

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on all of them; it is called there alone."""
        return self.everyones(make() if self.first else None)[0]

    def alike(self, mark: str, what: str) -> None:
        """Raises CannotRun, on all ranks, unless all have the same mark. what: it is a mark of, in words."""
        if len(set(self.everyones(mark))) > 1:
            raise CannotRun(
                f"The ranks do not have the same {what}, so their sums are not those of one run; run it without --ranks, or mend "
                "what differs between processes."
            )

    def share(self, indices: Sequence[int], lengths: Sequence[int]) -> Sequence[int]:
        """This rank's of `indices`, ascending: dealt longest first, each to who has the fewest tokens so far."""
        if self.count == 1:
            return indices
        loads, mine = [0] * self.count, []
        for index in sorted(indices, key=lambda i: (-lengths[i], i)):
            least = loads.index(min(loads))
            loads[least] += max(1, lengths[index])
            if least == self.number:
                mine.append(index)
        return sorted(mine)

    def joined(self, own: torch.Tensor) -> torch.Tensor:
        """[n in all] of [n] on every rank."""
        return own

    def add(self, sums: Iterable[dict[str, torch.Tensor]]) -> None:
        """Make of every tensor, in place, its sum over the ranks; names and shapes are the same on all."""

    def lend(self, parts: Sequence[torch.Tensor]) -> None:
        """From now on all may `gather` these, each by its place; all call it, with as many of the same sizes. (): no more."""
        if parts:
            self.alike(str([len(part) for part in parts]), "blocks of the model")
        self._parts = parts

    def gather(self, number: int, room: torch.Tensor) -> None:
        """Write what all have lent under this number into `room` [ranks * n], rank after rank. Any may call it at any time: the
        others see to it in their next exchange, whatever that is."""
        room.copy_(self._parts[number])


class Group(Ranks):
    """One of several ranks: torch.distributed, gloo between CPUs and NCCL between cards; words go by gloo.

    It looks at whether an exchange is over instead of waiting in it, so that a signal is heard meanwhile. Raises RankLost where
    another rank is gone or does not answer.
    """

    def __init__(self, number: int, count: int):
        import torch.distributed as dist

        self.number, self.count = number, count
        self._dist, self._words = dist, dist.new_group(backend="gloo", timeout=IDLE)

    def everyones(self, value: T, patience: float = WAIT) -> list[T]:
        return self._exchange(value=value, patience=patience)

    def gather(self, number: int, room: torch.Tensor) -> None:
        self._exchange(wanted=number, room=room)

    def failed(self, status: str, sentence: str) -> tuple[str, str]:
        try:
            self._exchange(trouble=(status, sentence))
        except Failed as together:
            return together.status, str(together)
        raise AssertionError("a failure was not heard")

    def joined(self, own: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat(self.everyones(own.cpu()))

    def add(self, sums: Iterable[dict[str, torch.Tensor]]) -> None:
        import torch

        packs = list(_packs([tensor for own in sums for tensor in own.values() if tensor.numel()]))
        self.everyones(None)  # nobody has failed: all are here, and stay to the end
        for pack in packs:
            flat = pack[0]

            def begin(pack=pack):
                nonlocal flat
                if len(pack) > 1 or not flat.is_contiguous():
                    flat = torch.cat([tensor.reshape(-1) for tensor in pack])
                return self._dist.all_reduce(flat, async_op=True)

            self._over(begin, WAIT)
            if flat is not pack[0]:
                for tensor, part in zip(pack, flat.split([tensor.numel() for tensor in pack]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def _exchange(
        self, value: Any = None, trouble=None, wanted: int | None = None, room=None, patience=WAIT
    ) -> list[Any]:
        """What all have to say. Whoever wants a block is served first, by those too who are here for something else: these say
        it again, until all do. So ranks need not want the same, nor as often. wanted, room: as of `gather`, which ends it."""
        content = pickle.dumps((trouble, wanted, value))
        while True:
            sizes, found = self._said(content, SLOT, patience)
            short = [
                one if size <= SLOT else pickle.dumps((None, None, None))
                for one, size in zip(found, sizes, strict=True)
            ]
            said = list(map(pickle.loads, short))
            wants = [want for _, want, _ in said]
            if max(sizes) > SLOT and wants == [None] * self.count:
                _, found = self._said(content, max(sizes), patience)
                said = list(map(pickle.loads, found))
            troubles = {number: one[0] for number, one in enumerate(said) if one[0] is not None}
            if troubles:
                number, (status, sentence) = min(troubles.items())
                raise Failed(status, sentence if len(troubles) == self.count else f"Rank {number}: {sentence}")
            self._serve(wants, room)
            if wanted is not None or wants == [None] * self.count:
                return [value for _, _, value in said]

    def _serve(self, wants: Sequence[int | None], room: torch.Tensor | None) -> None:
        """Hand everyone the block that it wants; who wants none needs no room for it."""
        for number in sorted({want for want in wants if want is not None}):
            part, who = self._parts[number], [rank for rank, want in enumerate(wants) if want == number]
            if len(who) == self.count:
                # its newer name: the older one warns
                all_gather = getattr(self._dist, "all_gather_single", None) or self._dist.all_gather_into_tensor
                self._over(partial(all_gather, room, part, async_op=True), WAIT)
                continue
            for rank in who:
                into = list(room.chunk(self.count)) if rank == self.number else None
                self._over(partial(self._dist.gather, part, into, dst=rank, async_op=True), WAIT)

    def _said(self, content: bytes, room: int, patience: float) -> tuple[list[int], list[bytes]]:
        """How much every rank has to say, and, where it is no more than `room`, what."""
        import torch

        mine = torch.zeros(8 + room, dtype=torch.uint8)
        head = len(content).to_bytes(8, "little") + (content if len(content) <= room else b"")
        mine[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        self._over(lambda: self._dist.all_gather(theirs, mine, group=self._words, async_op=True), patience)
        found = [one.numpy().tobytes() for one in theirs]
        sizes = [int.from_bytes(one[:8], "little") for one in found]
        return sizes, [one[8 : 8 + size] for one, size in zip(found, sizes, strict=True)]

    def _over(self, begin: Callable[[], Any], patience: float) -> None:
        """Begin an exchange and see it through; whatever goes wrong in it, the ranks have lost touch."""
        limit, pause = time.monotonic() + patience, 2e-5
        try:
            work = begin()
            while not work.is_completed():
                if time.monotonic() > limit:
                    raise RankLost(f"A rank has not answered for {patience:.0f} seconds")
                time.sleep(pause)
                pause = min(2 * pause, 2e-3 if patience < FOREVER else 5e-2)
            work.wait()
        except Exception as error:
            # of another rank, or of this one: the others are in the exchange, and would wait for it
            raise RankLost(f"A rank of this run is gone ({first_line(error, longest=200)})") from error


def _packs(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type and place, together of up to PACK numbers."""
    pack: list[torch.Tensor] = []
    for tensor in tensors:
        alike = not pack or (tensor.dtype, tensor.device) == (pack[0].dtype, pack[0].device)
        if pack and not (alike and sum(map(lambda t: t.numel(), pack)) + tensor.numel() <= PACK):
            yield pack
            pack = []
        pack.append(tensor)
    if pack:
        yield pack


@dataclass(frozen=True)
class Place:
    """Where a process is among the ranks, as its environment says.

    Attributes:
        number, count: as of Ranks.
        local, here: its number among the ranks of this machine, and how many these are.
        meeting: for torch.distributed.
        led: whether `dpft run --ranks` started it, which tells how things end.
    """

    number: int
    count: int
    local: int
    here: int
    meeting: str
    led: bool


def place() -> Place | None:
    """None for a process that is not one of several ranks; those of torchrun are, too."""
    led = MEETING in os.environ
    if not led and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    number, count, local, here = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return (
        Place(number, count, local, here, f"file://{os.environ[MEETING]}" if led else "env://", led)
        if count > 1
        else None
    )


ALONE = Ranks()
_here: Ranks = ALONE


def here() -> Ranks:
    """This process among the ranks that make its runs."""
    return _here


@contextmanager
def met(where: Place, cuda: bool) -> Iterator[Group]:
    """Inside, `here` is one of several. Returns when all have come."""
    import torch.distributed as dist

    global _here
    if sys.platform.startswith("linux") and where.here == where.count:
        # words do not leave the machine, which need not know its name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    rank = {"rank": where.number, "world_size": where.count} if where.led else {}
    dist.init_process_group(backend, init_method=where.meeting, timeout=timedelta(seconds=WAIT), **rank)
    _here = group = Group(where.number, where.count)
    try:
        yield group
        dist.destroy_process_group()
    finally:
        _here = ALONE

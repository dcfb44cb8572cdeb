"""Where noise comes from: standard draws that reach into the tail, added to tensors piece by piece.

Three streams, by the `noise_stream` of a run's spec:

- 2, on a CPU and wherever `--secure-noise` asks for it: `KeyStream`, AES-256 in counter mode. A piece of noise is a function of
  the key and the piece's number, so no schedule and no number of threads changes it.
- 2, on a GPU: `DeviceStream`, the device's own generator in float64.
- 1, runs of older versions: `LegacyStream`, PyTorch's fp32 draws, whose tail ends at 5.77 standard deviations on a CPU
  (harness/privacy/tail.py says what that costs). Only `dpft run --replay` makes it.

Both kinds of stream 2 draw Gaussians as Box and Muller (1958): radius sqrt(-2 log u), angle uniform. What bounds the radius is
the smallest u: fp32 draws of 24 bits end at sqrt(2 * 24 * log 2) = 5.77.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy
import torch

from dpft.harness import devices
from dpft.harness.train.old_noise import LegacyStream
from dpft.harness.train.ranks import ALONE, Ranks

PIECE = 1 << 18  # numbers of a piece on a CPU, part of what stream 2 is; each piece costs some twenty calls
DEVICE_PIECE = 1 << 22  # on a GPU every piece costs some launches, and some buffers in float64
RARE = (
    2.0**-10
)  # a smaller u is drawn again below RARE, with 53 bits: in fp32 the grid of 2^-24 is fine enough only above
TAIL = 2.0**-20  # of `endless_laplace`
THREADS = 4

Tensors = Sequence[torch.Tensor]


class KeyStream:
    """Noise by AES-256 in counter mode: piece i is a function of the key and of i.

    As fast as PyTorch's fp32 draws on a CPU, and no weaker than the key: whoever has seen any number of draws can predict
    none of the others. key: 32 bytes. Tensors on other devices get their noise from the CPU.
    """

    spread = 1.0  # standard deviation of its Gaussian draws

    def __init__(self, key: bytes):
        if len(key) != 32:
            raise ValueError(f"a key has 32 bytes, not {len(key)}")
        self._key, self._next = key, 0
        self._workers: ThreadPoolExecutor | None = None

    def add(self, tensors: Tensors, scale: float, divisor: float, kind: str) -> None:
        """`tensor.add_(scale * draws).div_(divisor)` for each tensor (contiguous); kind: `gaussian` or `laplace`."""
        pieces = list(_packed(tensors, PIECE))
        first, self._next = self._next, self._next + len(pieces)
        threads = torch.get_num_threads()
        count = min(THREADS, threads, len(pieces))

        sizes = [sum(map(torch.Tensor.numel, piece)) for piece in pieces]

        def work(start: int) -> None:
            scratch = Scratch(self._key, max(sizes))
            for number in range(start, len(pieces), count):
                draws = scratch.draw(kind, first + number, sizes[number])
                for part, own in zip(pieces[number], draws.split([p.numel() for p in pieces[number]]), strict=True):
                    part.add_(devices.sent(own, part.device), alpha=scale).div_(divisor)

        if threads > 1 and self._workers is None:
            self._workers = _serial_workers(min(THREADS, threads))
        for _ in self._workers.map(work, range(count)) if threads > 1 else map(work, range(count)):
            pass

    def room(self, tensors: Tensors) -> list[torch.Tensor]:
        """Buffers as large as `add` needs for them on one thread, for predicting memory."""
        count = min(PIECE, sum(tensor.numel() for tensor in tensors))
        return [*_buffers(count), torch.empty(count + 1, dtype=torch.int32)]

    def uniform(self, count: int = 1) -> numpy.ndarray:
        """[count] float64, each uniform on the 2^53 midpoints of (0, 1)."""
        self._next += 1
        return _uniform(_cipher(self._key, self._next - 1), count)

    def state(self) -> torch.Tensor:
        """How many pieces were drawn, for a checkpoint; the key is not in it."""
        return torch.tensor([self._next])

    def set_state(self, state: torch.Tensor) -> None:
        self._next = int(state[0])

    def close(self) -> None:
        """End the threads."""
        if self._workers is not None:
            self._workers.shutdown()


class DeviceStream:
    """Noise by a device's own generator, in float64: no value is looked at, so the host never waits.

    The smallest u of a Gaussian is 2^-106: it has the 53 bits of one draw and below them those of a second.
    """

    spread = 1.0  # standard deviation of its Gaussian draws

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def add(self, tensors: Tensors, scale: float, divisor: float, kind: str) -> None:
        """As `KeyStream.add`."""
        draw = self._gaussian if kind == "gaussian" else self._laplace
        for parts in _packed(tensors, DEVICE_PIECE):
            sizes = [part.numel() for part in parts]
            for part, own in zip(parts, draw(sum(sizes)).split(sizes), strict=True):
                part.add_(own, alpha=scale).div_(divisor)

    def room(self, tensors: Tensors) -> list[torch.Tensor]:
        """As `KeyStream.room`: four float64 numbers for every two draws, and the draws."""
        count = min(DEVICE_PIECE, sum(tensor.numel() for tensor in tensors))
        return [torch.empty(3 * count, dtype=torch.float64, device=self._generator.device)]

    def uniform(self, count: int = 1) -> numpy.ndarray:
        """As `KeyStream.uniform`."""
        return (self._rand(count) + 2.0**-54).cpu().numpy()

    def state(self) -> torch.Tensor:
        return self._generator.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def close(self) -> None:
        """Nothing to end."""

    def _rand(self, count: int) -> torch.Tensor:
        return torch.rand(count, dtype=torch.float64, generator=self._generator, device=self._generator.device)

    def _gaussian(self, count: int) -> torch.Tensor:
        pairs = (count + 1) // 2
        radius = self._rand(pairs).add_(self._rand(pairs).add_(2.0**-54), alpha=2.0**-53).log_().mul_(-2).sqrt_()
        angle = self._rand(pairs).mul_(2 * math.pi)
        return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)])[:count]

    def _laplace(self, count: int) -> torch.Tensor:
        signed = self._rand(count).mul_(2).sub_(1 - 2.0**-53)  # the midpoints of 2^53 cells of (-1, 1)
        return signed.sign().mul_(signed.abs_().log_().neg_())


Source = KeyStream | DeviceStream | LegacyStream


def source(device: str | torch.device, *key: object, version: int = 2) -> Source:
    """The stream of that version on `device`, seeded by SHA-256 of `key`: streams of different keys are independent."""
    if version == 1:
        return LegacyStream(stream(device, *key))
    return KeyStream(_digest(key)) if torch.device(device).type == "cpu" else DeviceStream(stream(device, *key))


def secret_source(ranks: Ranks = ALONE) -> KeyStream:
    """A stream with 256 bits of the operating system's entropy as its key, which is kept nowhere else; on all ranks the same."""
    return KeyStream(ranks.same(lambda: os.urandom(32)))


def stream(device: str | torch.device, *key: object) -> torch.Generator:
    """A PyTorch generator seeded by SHA-256 of `key`, for what need not be secret: batches, heads, projections."""
    return torch.Generator(device=device).manual_seed(int.from_bytes(_digest(key)[:8], "big") >> 1)


def _digest(key: Sequence[object]) -> bytes:
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def _serial_workers(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch computes on one thread each: it would split every call over others of its own.

    The number of threads is a setting of the thread that sets it, and what threads started later begin with.
    """
    threads, started = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    workers = ThreadPoolExecutor(count)
    for _ in range(count):
        workers.submit(begin)
    started.wait()
    torch.set_num_threads(threads)
    return workers


def _packed(tensors: Tensors, size: int) -> Iterator[list[torch.Tensor]]:
    """The numbers of `tensors`, flat and in order, in pieces of `size` (the last may be shorter), each a list of parts."""
    parts, room = [], size
    for tensor in tensors:
        flat = tensor.view(-1)
        while len(flat):
            parts.append(flat[:room])
            flat, room = flat[len(parts[-1]) :], room - len(parts[-1])
            if room == 0:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def _cipher(key: bytes, number: int):
    """The key stream of one piece: 2^64 blocks of the counter, so that pieces never meet."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.CTR((number << 64).to_bytes(16, "big"))).encryptor()


def _uniform(cipher, count: int) -> numpy.ndarray:
    bits = numpy.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8") >> 11
    return (bits + 0.5) * 2.0**-53


_HALF = torch.tensor(0.5)
_BELOW_RARE = numpy.int32(RARE * 2**32 - 2**31)


@functools.cache
def _zeros() -> memoryview:
    return memoryview(bytes(8 * PIECE))


class Scratch:
    """Buffers of one thread, for pieces of up to `room` numbers."""

    def __init__(self, key: bytes, room: int = PIECE):
        self._key = key
        self._bytes = bytearray(8 * room + 32)  # the cipher wants room for one block more
        self._words = torch.frombuffer(self._bytes, dtype=torch.int32, count=room + 1)
        self._radius, self._angle, self._draws = _buffers(room)

    def draw(self, kind: str, number: int, count: int) -> torch.Tensor:
        """Piece `number`, [count], fp32; valid until the next call."""
        cipher = _cipher(self._key, number)
        return self._gaussian(cipher, count) if kind == "gaussian" else self._laplace(cipher, count)

    def _gaussian(self, cipher, count: int) -> torch.Tensor:
        pairs = (count + 1) // 2
        cipher.update_into(_zeros()[: 8 * pairs], self._bytes)
        words = self._words[: 2 * pairs]  # signed
        radius, angle = self._radius[:pairs].copy_(words[:pairs]), self._angle[:pairs].copy_(words[pairs:])
        rare = numpy.flatnonzero(words[:pairs].numpy() < _BELOW_RARE)
        torch.add(_HALF, radius, alpha=2.0**-32, out=radius).log_().mul_(-2).sqrt_()  # of u = 1/2 + word / 2^32
        if len(rare):
            radius.numpy()[rare] = numpy.sqrt(-2 * numpy.log(_uniform(cipher, len(rare)) * RARE))
        angle.mul_(math.pi * 2.0**-31)
        draws = self._draws[: 2 * pairs]
        torch.cos(angle, out=draws[:pairs]).mul_(radius)
        torch.sin(angle, out=draws[pairs:]).mul_(radius)
        return draws[:count]

    def _laplace(self, cipher, count: int) -> torch.Tensor:
        cipher.update_into(_zeros()[: 8 * count], self._bytes)
        bits = numpy.frombuffer(self._bytes, dtype="<i8", count=count) >> 10
        signed = (bits + 0.5) * 2.0**-53  # uniform on the midpoints of 2^54 cells of (-1, 1)
        return torch.from_numpy((-numpy.sign(signed) * numpy.log(numpy.abs(signed))).astype(numpy.float32))


def _buffers(room: int) -> list[torch.Tensor]:
    """Radii, angles and draws of `room` numbers."""
    pairs = (room + 1) // 2
    return [torch.empty(pairs), torch.empty(pairs), torch.empty(2 * pairs)]


def endless_laplace(uniform: Callable[[], float]) -> float:
    """One draw of Laplace(1) that may be as large as it likes; uniform: draws from (0, 1), on a grid of 2^-53.

    The logarithm of a small u would come from few bits, and of the least there is none: below TAIL the rest is drawn anew, for
    an exponential has no memory.
    """
    sign, magnitude, u = (1.0 if uniform() < 0.5 else -1.0), 0.0, uniform()
    while u < TAIL:
        magnitude, u = magnitude - math.log(TAIL), uniform()
    return sign * (magnitude - math.log(u))


def gamma(uniform: Callable[[], float], shape: float) -> float:
    """One Gamma(shape) draw of scale 1, by its quantile function."""
    from scipy import special

    return float(special.gammaincinv(shape, uniform()))

"""A machine with cards that are not there: tensors on the device `card` hold real numbers in the host's memory, and keep a
card's rules.

Whatever a GPU would be waited for is noted as a look, with the line of the package that asked. Tensors of two places in one
operation raise, as they do on CUDA, and so do a card's tensors in numpy. Two cards can be current, timed and counted; tensors
are on the first. What is computed is computed on the CPU: this says nothing of speed, of kernels or of a card's rounding.
Registering a device is for the whole process, so this is imported in processes of its own.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = str(Path(__file__).absolute().parents[2])
aten = torch.ops.aten

# What needs a value on the host: a number, how many rows a result has, whether a decomposition converged.
LOOKS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal, aten.bincount, aten._coalesce, aten._linalg_check_errors, aten.linalg_eigh, aten._linalg_eigh, aten._linalg_svd,
    aten.is_nonzero, aten.histc, aten.multinomial,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
PINNED = "_pinned"


@dataclass(frozen=True)
class Look:
    """What waited for the card: an operation, and the last line of the package that asked for it."""

    operation: str
    line: str


class Event:
    """A mark in the stream of the card that is current, or of `stream`'s."""

    def __init__(self, enable_timing=False):
        self.card = None

    def record(self, stream=None):
        self.card = machine().current if stream is None else stream.card
        machine().events[self.card] += 1

    def elapsed_time(self, other):
        assert self.card == other.card, "two cards have no common time"
        return 1.0


class Module:
    """`torch.card`, as far as dpft and torch ask."""

    Event = Event

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def device_count(self):
        return 2

    def current_device(self):
        return machine().current

    def current_stream(self, device=None):
        return SimpleNamespace(card=machine().number(device))

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device="card"):
        return torch.get_rng_state()

    def set_rng_state(self, state, device="card"):
        torch.set_rng_state(state)

    def synchronize(self, device=None):
        machine().waited[machine().number(device)] += 1

    def max_memory_allocated(self, device=None):
        machine().counted[machine().number(device)] += 1
        return 1000

    def reset_peak_memory_stats(self, device=None):
        machine().counted[machine().number(device)] += 1

    @contextmanager
    def device(self, device):
        before, machine().current = machine().current, machine().number(device)
        try:
            yield
        finally:
            machine().current = before


_setup_privateuseone_for_python_backend("card", Module())
torch._C._set_only_lift_cpu_tensors(True)
torch.__future__.set_swap_module_params_on_conversion(True)
_MACHINES = []


def machine():
    return _MACHINES[-1]


class Card(torch.Tensor):
    """A tensor on the card; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner, device):
        strided = inner.layout is torch.strided
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride() if strided else None,
            storage_offset=inner.storage_offset() if strided else None,
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner = inner
        return made

    def __repr__(self):
        return f"Card({self.inner})"

    def tolist(self):
        return self.detach().cpu().tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return machine().called(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of the card, or of the host."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return self.place


class Machine(TorchDispatchMode):
    """The machine, while it is entered.

    Attributes:
        looks: what waited for the card so far.
        current: number of the card that is current.
        events, waited, counted: by card: marks in its stream, waits for all of it, questions about its memory.
    """

    def __init__(self, current=0):
        super().__init__()
        self.looks, self.current = [], current
        self.events, self.waited, self.counted = Counter(), Counter(), Counter()

    def __enter__(self):
        _MACHINES.append(self)
        self._generator, torch.Generator = torch.Generator, Generator
        return super().__enter__()

    def __exit__(self, *what):
        super().__exit__(*what)
        torch.Generator = self._generator
        _MACHINES.pop()

    def number(self, device):
        index = None if device is None else device if isinstance(device, int) else torch.device(device).index
        return self.current if index is None else index

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.called(func, args, kwargs or {})

    def looked(self, operation):
        self.looks.append(Look(str(operation), _line()))

    def called(self, func, args, kwargs):
        packet = func.overloadpacket
        leaves = list(_leaves((*args, *kwargs.values())))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        cards = [t for t in tensors if isinstance(t, Card)]
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if packet in (aten.pin_memory, aten._pin_memory):
            made = tensors[0].clone()
            setattr(made, PINNED, True)
            return made
        if packet is aten.is_pinned:
            return hasattr(tensors[0], PINNED)
        target = asked if asked is not None else cards[0].device if cards else torch.device("cpu")
        if target.type == "card" and target.index is None:
            target = torch.device("card", self.current)
        if packet in (aten._to_copy, aten.copy_):
            target = self._copied(packet, tensors, target, args, kwargs)
        elif cards:
            self._ruled(func, packet, args, tensors, cards)
        for leaf in leaves:
            if isinstance(leaf, torch.Generator) and leaf.device.type != target.type:
                raise RuntimeError(f"Expected a generator of {target.type}, found one of {leaf.device.type}.")
        if asked is not None:
            kwargs = {**kwargs, "device": "cpu" if target.type == "card" else asked}
        pinned = kwargs.get("pin_memory")
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
        made = func(*_inside(args), **{key: _inside(value) for key, value in kwargs.items()})
        if target.type == "card":
            made = _outside(made, target)
        elif pinned:
            setattr(made, PINNED, True)
        if not cards:
            return made
        return return_and_correct_aliasing(func, args, kwargs, made)

    def _copied(self, packet, tensors, target, args, kwargs):
        """Where a copy is. Waits unless it goes from pinned memory, or stays on the card."""
        source = tensors[-1]
        if packet is aten.copy_:
            target = tensors[0].device
        if source.device != target and "card" in (source.device.type, target.type):
            waits = not (kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:3] == (True,)))
            if waits or source.device.type == "card" or not hasattr(source, PINNED):
                self.looked(f"copy {source.device.type} to {target.type}")
        return target

    def _ruled(self, func, packet, args, tensors, cards):
        """Raises RuntimeError for tensors of two places, and notes what waits."""
        hosts = [t for t in tensors if not isinstance(t, Card)]
        if packet in INDEXING:
            indices = [t for t in args[1] if t is not None]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                self.looked(f"{packet} by a mask")
            if any(t.device.type == "cpu" for t in indices):
                self.looked(f"{packet} by numbers on the host")
            hosts = [t for t in hosts if not any(t is index for index in indices)]
        elif packet in LOOKS:
            self.looked(packet)
        scalars = torch.Tag.pointwise in func.tags or "foreach" in str(packet)
        wrong = [t for t in hosts if t.dim() or not scalars]
        if wrong:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {packet} found {cards[0].device} and cpu."
            )


def _leaves(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


def _inside(value):
    if isinstance(value, Card):
        return value.inner
    return type(value)(map(_inside, value)) if type(value) in (tuple, list) else value


def _outside(value, device):
    if isinstance(value, torch.Tensor):
        return Card(value, device)
    return type(value)(_outside(one, device) for one in value) if type(value) in (tuple, list) else value


def _line():
    """The innermost line of the package on the stack, as `harness/train/loop.py:12`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(f"{ROOT}/tests"):
            return f"{name.removeprefix(ROOT + '/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"

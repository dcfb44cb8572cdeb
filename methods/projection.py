"""Random projections of one side of a weight, made from a seed whenever they are needed: nothing of them is stored."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.encoding import Encoding

KINDS = ("gaussian", "rows", "srht", "identity")
SCALES = ("unbiased", "code")


def generator(device: torch.device, seed: int, *counters: int) -> torch.Generator:
    """The stream of one projection (of a layer, after so many refreshes) or direction: a function of these alone."""
    import torch

    digest = hashlib.sha256("/".join(map(str, ("projection", seed, *counters))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(kind: str, shape: torch.Size, side: int, rank: int, scale: str, generator: torch.Generator) -> Encoding:
    """The projection of a weight of `shape`, seen as [m, n], along its side 0 (m) or 1 (n), to `rank` coordinates.

    With S [side, rank] the encoded gradient is S^T G or G S, and E[S S^T] is the identity (`unbiased`), or 1/rank of it (`code`:
    entries of standard deviation 1/rank, as the authors of 2506.15588 draw them). In fp32, on the generator's device: devices
    of one kind draw the same.
    gaussian: entries N(0, 1/rank). rows: coordinates without replacement, times sqrt(side/rank). srht: random signs, a
    Hadamard transform of the next power of two, `rank` of its columns (1011.1595). identity: the first coordinates, unscaled.
    """
    import torch

    from dpft.harness.query.encoding import Encoding

    device = generator.device
    size = (shape[0], shape[1:].numel())[side]
    factor = rank**-0.5 if scale == "code" else 1.0
    if kind == "identity":
        matrix, factor = torch.arange(min(rank, size), device=device), 1.0
    elif kind == "rows":
        matrix = torch.randperm(size, generator=generator, device=device)[:rank].sort().values
        factor *= (size / rank) ** 0.5
    elif kind == "srht":
        matrix = _srht(size, rank, generator).mul_(factor * rank**-0.5)
    else:
        matrix = torch.randn(size, rank, generator=generator, device=device).mul_(factor * rank**-0.5)
    return Encoding(left=matrix if side == 0 else None, right=matrix if side == 1 else None, scale=factor)


def _srht(size: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """`rank` columns of the Hadamard matrix of the next power of two, its first `size` rows, with random signs: all +-1.

    Entry (i, j) of a Hadamard matrix is the parity of the bits that i and j have in common.
    """
    import torch

    device = generator.device
    bits = max(1, (size - 1).bit_length())
    columns = torch.randperm(1 << bits, generator=generator, device=device)[:rank]
    signs = torch.randint(2, (size,), generator=generator, device=device)
    rows = torch.arange(size, device=device)
    parity = signs[:, None].expand(size, rank).clone()
    for bit in range(bits):
        parity ^= ((rows >> bit) & 1)[:, None] & ((columns >> bit) & 1)[None, :]
    return (1 - 2 * parity).float()

"""Which trainable tensors are matrices to a decoder, and views of them: fused projections in parts, convolutions flattened."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dpft.harness.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn

# Query, key and value in one weight: GPT-2; Phi, Baichuan; Falcon, GPT-NeoX, BLOOM; MPT, ModernBERT; torch's own attention. Of an
# adapter on one only B has the fused dimension.
FUSED = re.compile(
    r"(^|\.)((c_attn|qkv|qkv_proj|query_key_value|Wqkv)(\.base_layer|\.lora_B\.\w+)?\.weight|in_proj_weight)$"
)


def check_scope(scope: str) -> None:
    """Raises BadInput unless `scope` is all, body or a regular expression."""
    if scope not in ("all", "body"):
        try:
            re.compile(scope)
        except re.error as error:
            raise BadInput(
                f"scope = {scope!r} is neither all, nor body, nor a regular expression ({error}); correct it."
            ) from None


def matrices_of(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Names of the trainable weights that are matrices, convolutions among them; embedding tables are not."""
    from torch import nn

    modules = list(model.modules())
    tables = {id(p) for module in modules if isinstance(module, nn.Embedding) for p in module.parameters(recurse=False)}
    filters = {id(module.weight) for module in modules if isinstance(module, nn.modules.conv._ConvNd)}
    return [name for name, p in parameters.items() if id(p) not in tables and (p.dim() == 2 or id(p) in filters)]


def matrix_names(
    model: nn.Module, parameters: dict[str, nn.Parameter], head: frozenset[str], scope: str
) -> frozenset[str]:
    """Names of the trainable weights that are matrices, embedding tables left out.

    scope: `all`, `body` (without the head) or a regular expression that a name must contain. Raises BadInput when none is left.
    """
    matrices = matrices_of(model, parameters)
    found = {
        name
        for name in matrices
        if scope == "all" or (name not in head if scope == "body" else re.search(scope, name) is not None)
    }
    if not found:
        raise BadInput(
            f"The decoder finds no matrix to work on: {len(parameters)} tensors train, {len(matrices)} of them are matrices, "
            f"and scope = {scope!r} leaves none; widen scope, or use decoder=mean."
        )
    return frozenset(found)


def views(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two-dimensional views of one tensor by name; a single row or column is no matrix and is left out.

    A fused projection [d, 3d] or [3d, d] is cut in three along its longer side. With fewer keys than queries (grouped attention)
    the first square is the queries and the rest is halved. Where a model interleaves the three by heads, a part holds
    a third of the heads: the noise in it is white all the same.
    """
    flat = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 2 else tensor
    if min(flat.shape) < 2:
        return {}
    if not FUSED.search(name) or flat.shape[0] == flat.shape[1]:
        return {name: flat}
    side = 0 if flat.shape[0] > flat.shape[1] or "lora_B" in name else 1
    length, other = flat.shape[side], flat.shape[1 - side]
    if length % 3 == 0 and (length == 3 * other or "lora_B" in name):
        sizes = [length // 3] * 3
    elif other < length < 3 * other and (length - other) % 2 == 0:
        sizes = [other, (length - other) // 2, (length - other) // 2]
    else:
        return {name: flat}
    parts = zip("qkv", flat.split(sizes, dim=side), strict=True)
    return {f"{name}[{part}]": view for part, view in parts if min(view.shape) > 1}

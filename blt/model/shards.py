"""Which rows of a parameter this process holds: all of them, or a shard of several ranks (FSDP2's DTensor)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, in the same memory: all of it, or a shard."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows [R, ...] of a parameter in this process, which share its memory, and the number of the first one."""
    if not hasattr(parameter, "to_local"):
        return parameter.detach(), 0
    sharded: Any = parameter
    (chunk,) = sharded.__create_chunk_list__()
    return local(parameter).detach(), chunk.offsets[0]

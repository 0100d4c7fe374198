"""Which rows of a parameter this process holds: all of them, or a shard of several ranks (FSDP2's DTensor)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows [R, ...] of a parameter in this process, which share its memory, and the number of the first one."""
    if not hasattr(parameter, "to_local"):
        return parameter.detach(), 0
    sharded: Any = parameter
    (chunk,) = sharded.__create_chunk_list__()
    rows: Tensor = sharded.to_local().detach()
    return rows, chunk.offsets[0]

"""Snapshots of the beginnings of prompts, so that a later prompt with the same beginning does not read it again.

A snapshot is taken while a prompt is read, at a multiple of the batch's slice. A row that continues from it makes the
same calls as a row that reads everything, so results are bit-identical. Two places are worth a snapshot: the end of
each prompt (the next turn of a conversation repeats all of it), and the place where a prompt leaves an earlier one
(both share a system prompt, and so may others).

Letters: N tokens of a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from ..ids import Ids, shared_length
from .snapshot import Snapshot

LEAST = 64
"""Tokens below which reading again is cheaper than a snapshot."""
MOST_PROMPTS = 256
"""Prompts that are remembered, to find where a later one leaves them."""

Key = tuple[Hashable, bytes]


class PrefixCache:
    """Up to `limit` bytes of snapshots; the least recently used are dropped. slice: of the batch, in tokens.

    group: prompts share snapshots within their group only. Not thread-safe.
    """

    def __init__(self, limit: int, slice: int) -> None:
        self._limit, self._slice = limit, slice
        self._snapshots: OrderedDict[Key, Snapshot] = OrderedDict()
        self._prompts: OrderedDict[Key, None] = OrderedDict()
        self.nbytes = self.queries = self.hits = 0

    def longest(self, ids_N: Ids, group: Hashable) -> Snapshot | None:
        """The snapshot with the longest beginning of ids [N] that leaves at least one id to read."""
        packed = _packed(ids_N[:-1])
        found = [key for key in self._snapshots if key[0] == group and packed.startswith(key[1])]
        self.queries += len(ids_N)
        if not found:
            return None
        key = max(found, key=lambda key: len(key[1]))
        self._snapshots.move_to_end(key)
        self.hits += self._snapshots[key].position
        return self._snapshots[key]

    def places(self, ids_N: Ids, start: int, group: Hashable) -> list[int]:
        """Lengths of beginnings of ids [N], longer than `start`, that are worth a snapshot; ascending. The prompt is
        remembered."""
        shared = [shared_length(ids_N, _unpacked(packed)) for other, packed in self._prompts if other == group]
        key = (group, _packed(ids_N))
        self._prompts[key] = None
        self._prompts.move_to_end(key)
        if len(self._prompts) > MOST_PROMPTS:
            self._prompts.popitem(last=False)
        ends = {min(end, len(ids_N) - 1) // self._slice * self._slice for end in (max(shared, default=0), len(ids_N))}
        return sorted(end for end in ends if end >= max(LEAST, start + 1))

    def add(self, ids_N: Ids, snapshot: Snapshot, group: Hashable) -> None:
        """Keeps the snapshot after ids [N], unless it alone exceeds the limit."""
        if snapshot.nbytes > self._limit:
            return
        key = (group, _packed(ids_N))
        if (old := self._snapshots.pop(key, None)) is not None:
            self.nbytes -= old.nbytes
        self._snapshots[key] = snapshot
        self.nbytes += snapshot.nbytes
        while self.nbytes > self._limit:
            self.nbytes -= self._snapshots.popitem(last=False)[1].nbytes


def _packed(ids_N: Ids) -> bytes:
    return ids_N.astype("<u2").tobytes()  # below 65,536: the vocabulary has 260 ids


def _unpacked(packed: bytes) -> Ids:
    return np.frombuffer(packed, dtype="<u2").astype(np.int64)

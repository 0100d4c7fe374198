"""A copy of a stream's state, to be restored later or in other streams: a system prompt is read once.

Everything that the next byte depends on is copied: the used part of the caches, the byte states and patch
vectors still in use, the history, the rule's state, the logits. Nothing is computed again, so all later results are
bit-identical. The state of a sampler's random generator is not included.

Letters: N tokens, P patches, C cache slots, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ..backends.protocol import Array, Buffer, Part
from ..bundle.spec import RESIDENT, ModelSpec
from ..patching import PatchState
from .caches import CacheTrack
from .memory import Mark, Memory


@dataclass(frozen=True)
class Snapshot:
    """The state of a stream after `position` tokens, read-only, in `nbytes` bytes of memory.

    Made by `Stream.snapshot`. `Stream.restore` accepts it in any stream of the same model.

    Example:
        snapshot = stream.snapshot()
        other = model.stream()
        other.restore(snapshot)  # reads nothing again
    """

    position: int
    spec: ModelSpec
    owner: object
    patches: int
    rule: PatchState
    marks: tuple[Mark, ...]
    pool_base: int
    forgotten: int
    tracks: dict[str, CacheTrack]
    arrays: dict[str, Array]

    def is_of(self, spec: ModelSpec, owner: object) -> bool:
        """Whether streams of that model can restore it."""
        return self.owner is owner and self.spec == spec

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def take(memory: Memory, owner: object, logits_V: Array, forgotten: int) -> Snapshot:
    """Copies the state of a stream's memory. owner: the object that its model's streams share. forgotten: tokens that
    the stream no longer holds."""
    memory.note_writes()
    arrays = {name: view.copy() for name, view in _views(memory, logits_V).items()}
    arrays |= {name: buffer.read(part) for name, (buffer, part) in _caches(memory).items()}
    if not memory.spec.resident:
        arrays["pool"] = memory.pool.buffer.array[: memory.position - memory.pool.base].copy()
    for array in arrays.values():
        array.flags.writeable = False
    tracks = {name: copy.copy(graph.track) for name, graph in memory.graphs.items()}
    return Snapshot(
        memory.position,
        memory.spec,
        owner,
        memory.patches,
        memory.rule.copy(),
        tuple(memory.marks),
        memory.pool.base,
        forgotten,
        tracks,
        arrays,
    )


def put(snapshot: Snapshot, memory: Memory, logits_V: Array) -> None:
    """Restores `memory` and the logits. The spec must be the same."""
    memory.clear()
    memory.position, memory.patches = snapshot.position, snapshot.patches
    memory.rule = snapshot.rule.copy()
    memory.marks.extend(snapshot.marks)
    for name, graph in memory.graphs.items():
        graph.track = copy.copy(snapshot.tracks[name])
    if not memory.spec.resident:
        states = snapshot.arrays["pool"]
        memory.pool.reserve(0, len(states), keep=0)
        memory.pool.keep(0, states)
        memory.pool.begin(snapshot.pool_base)
    for name, view in _views(memory, logits_V).items():
        view[...] = snapshot.arrays[name]
    for name, (buffer, part) in _caches(memory).items():
        buffer.write(snapshot.arrays[name], part)


def _views(memory: Memory, logits_V: Array) -> dict[str, Array]:
    """The parts of the history that are in use, by name; their sizes follow from position and patches."""
    n, p = memory.position, memory.patches
    ring = {} if memory.spec.resident else {"kv_ring": memory.kv_ring.array}
    return {
        "logits": logits_V,
        "ids": memory.ids.array[0, : memory.pad + n],
        "documents": memory.documents.array[0, : n + 1],
        "entropy_documents": memory.entropy_documents.array[0, : n + 1],
        "entropies": memory.entropies.array[0, :n],
        "starts": memory.starts_P[: p + 1],
        "patch_documents": memory.patch_documents.array[0, : p + 1],
        **ring,
    }


def _caches(memory: Memory) -> dict[str, tuple[Buffer, Part]]:
    """Each cache [1, G, C, K] and the slots of it that are in use: all of a cache with a window, else those of the
    tokens read. Byte states in memory of the graphs are a cache without a window, patch vectors one with a window."""
    found: dict[str, tuple[Buffer, Part]] = {}
    for graph in memory.graphs.values():
        spec, tokens = graph.spec.cache, memory.patches if graph.spec.name == "latent" else memory.position
        used = tokens if spec is not None and spec.window is None else None
        slots = dict.fromkeys(graph.caches(), used) | _resident_slots(memory, graph.spec.name)
        for name, buffer in graph.caches().items():
            axes = [slice(None)] * (len(buffer.shape) - 2)
            found[f"{graph.spec.name}.{name}"] = buffer, (*axes, slice(slots[name]))
    return found


def _resident_slots(memory: Memory, graph: str) -> dict[str, int | None]:
    if not memory.spec.resident or graph not in RESIDENT:
        return {}
    return {RESIDENT[graph][0]: memory.position if graph == "encoder" else None}

"""What a model looks like to the code that drives it: four graphs, their tensors, caches and limits. No
weights here.

Letters of symbolic shapes: B rows, S bytes in this call, N byte states in the pool, P patches in this call,
L longest patch in this call, R patches in the decoder's pool. Everything else is a number. `ModelSpec` is
`spec` in a bundle's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from .errors import BltError, ConfigError, nearest
from .patching import PatchRule
from .records import from_dict, to_dict

GRAPHS = ("entropy", "encoder", "latent", "decoder")
LETTERS = "BSNPLR"
DTYPE_BYTES = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
CacheKind = Literal["ring", "window", "linear"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type ("int64", "float32", "float16") and shape with letters for what varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"tensor {self.name!r} has the type {self.dtype!r}: {nearest(self.dtype, DTYPE_BYTES)}")
        for size in self.shape:
            if size not in tuple(LETTERS) if isinstance(size, str) else size < 0:
                raise ConfigError(f"tensor {self.name!r} has the size {size!r}, not a number or one of {LETTERS}")

    def resolve(self, **sizes: int) -> tuple[int, ...]:
        """The shape with the letters replaced. Raises KeyError for a letter that is not given."""
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.shape)


@dataclass(frozen=True)
class CacheSpec:
    """How a graph's attention cache is laid out (capacity C entries per layer).

    ring: position p lives in slot p mod C; a call must not cross a multiple of C and must leave the window
    intact (S <= C - window + 1). window: ONNX Runtime's GroupQueryAttention with sliding_window_cache,
    restarted at slot 0 for each document. linear: nothing is evicted.
    """

    kind: CacheKind
    capacity: int
    window: int | None
    layers: int

    def __post_init__(self) -> None:
        if self.kind != "linear" and (self.window is None or self.window > self.capacity):
            raise ConfigError(f"a {self.kind} cache needs a window of at most its capacity {self.capacity}")

    @property
    def longest_call(self) -> int:
        """Most tokens that one call may take without overwriting what it still reads."""
        if self.kind != "ring" or self.window is None:
            return self.capacity
        return self.capacity - self.window + 1


@dataclass(frozen=True)
class GraphSpec:
    """One graph: tensors in order, its cache, and `aliases`: output -> input bound to the same memory.

    In a graph only the node that writes an aliased output may read its input: nothing orders other readers.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: dict[str, str]
    cache: CacheSpec | None

    def __post_init__(self) -> None:
        inputs, outputs = {t.name for t in self.inputs}, {t.name for t in self.outputs}
        for output, source in self.aliases.items():
            if output not in outputs or source not in inputs:
                raise ConfigError(f"graph {self.name!r} lacks {output!r} or its alias {source!r}")

    def tensor(self, name: str) -> TensorSpec:
        """The input or output of that name. Raises KeyError."""
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def has_input(self, name: str) -> bool:
        return any(t.name == name for t in self.inputs)

    def cache_bytes(self) -> int:
        """Bytes of the caches of one stream."""
        names = set(self.aliases.values())
        return sum(math.prod(t.resolve(B=1)) * DTYPE_BYTES[t.dtype] for t in self.inputs if t.name in names)


@dataclass(frozen=True)
class HashSpec:
    """Hash n-gram tables: functions x len(sizes) of them, `rows` rows each, `dim` wide."""

    sizes: tuple[int, ...]
    functions: int
    rows: int
    dim: int

    @property
    def tables(self) -> int:
        return self.functions * len(self.sizes)


@dataclass(frozen=True)
class ModelSpec:
    """All that a runtime has to know of a model besides its weights.

    encoder_window, decoder_window: how many patches' bytes a patch reads, and how many patches a byte reads
    (both 1 in the released models). capacity_bytes, capacity_patches: what one stream can hold. chunk: most
    bytes per prefill call. chunk_crosses_documents: False if a call must not contain a change of doc_start
    (GroupQueryAttention).
    """

    vocab_size: int
    hash: HashSpec | None
    patch_rule: PatchRule
    encoder_window: int
    decoder_window: int
    capacity_bytes: int
    capacity_patches: int
    chunk: int
    chunk_crosses_documents: bool
    latent_document_mask: bool
    graphs: dict[str, GraphSpec]

    def __post_init__(self) -> None:
        for name, graph in self.graphs.items():
            if name != graph.name:
                raise ConfigError(f"the graph {graph.name!r} is listed as {name!r}")
        for name in GRAPHS[1:]:
            if name not in self.graphs:
                raise ConfigError(f"the model lacks the graph {name!r}")
        if self.patch_rule.needs_entropy and "entropy" not in self.graphs:
            raise ConfigError("the patch rule needs entropies, but the model has no graph 'entropy'")
        for field in ("chunk", "capacity_bytes", "capacity_patches", "encoder_window", "decoder_window"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], error: type[BltError] = ConfigError) -> Self:
        """Raises `error` for unknown or missing keys and wrong types."""
        return from_dict(cls, data, "spec", error)

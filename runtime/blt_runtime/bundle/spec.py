"""A model's interface to the runtime: four graphs, their tensors, caches and limits. It holds no
weights.

Letters of symbolic shapes: B rows, S bytes in this call, N byte states in the pool, P patches in this call,
L longest patch in this call, R patches in the decoder's pool; in `row_spec` also Q rows of the caches, M most tokens
of one row, C slots of a cache. Everything else is a number. `ModelSpec` is
`spec` in a bundle's manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ..arguments import is_whole
from ..errors import ConfigError, nearest, shown
from ..hashing import PRIMES, TABLE_DTYPES, TableDtype
from ..patching import PatchRule

GRAPHS = ("entropy", "encoder", "latent", "decoder")
LETTERS = frozenset("BSNPLRQMC")
DTYPE_BYTES = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
CacheKind = Literal["ring", "window", "linear"]
Shape = tuple[int | str | None, ...]
"""Letters and numbers; None is any number."""
SIZES = ("vocab_size", "chunk", "capacity_bytes", "capacity_patches", "encoder_window", "decoder_window")
MARKS = 16
"""Patch boundaries that a rewind can return to without replaying everything."""
AHEAD = 16
"""Patches that a speculative pass may compute beyond those of the stream; rejected ones are dropped again."""
RESIDENT = {"encoder": ("past_states", "byte_states"), "latent": ("past_patches", "patch_kv")}
"""Input and output of the memory that resident graphs write (`resident_spec`), by graph."""
LONGEST_HASH = 1024
"""Most ids of a hash window; the released models have 8."""
PADDED = 8
"""Most tokens of a row in a call of `padded_spec`; the other size is 1."""
TABLES_OF_DEVICES = ("float32", "float16", "bfloat16")
"""Types of hash tables that graphs can gather from (`table_spec`)."""
_INTEGERS = {"ids", "positions", "doc_start", "byte_index", "patch_length", "own_start", "patch_row"}


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type ("int64", "float32", "float16") and shape, with letters for variable sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"tensor {self.name!r} has the type {self.dtype!r}: {nearest(self.dtype, DTYPE_BYTES)}")
        for size in self.shape:
            if size not in LETTERS if isinstance(size, str) else size < 0:
                known = ", ".join(sorted(LETTERS))
                raise ConfigError(f"tensor {self.name!r} has the size {size!r}, not a number or one of {known}")

    def resolve(self, **sizes: int) -> tuple[int, ...]:
        """The shape with the letters replaced. Raises KeyError for a letter that is not given."""
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.shape)


@dataclass(frozen=True)
class CacheSpec:
    """How a graph's attention cache is laid out (capacity C entries per layer).

    ring: position p is in slot p mod C; a call must not cross a multiple of C and must leave the window
    intact (S <= C - window + 1). window: ONNX Runtime's GroupQueryAttention with sliding_window_cache,
    restarted at slot 0 for each document. linear: nothing is evicted.
    """

    kind: CacheKind
    capacity: int
    window: int | None
    layers: int

    def __post_init__(self) -> None:
        if min(self.capacity, self.layers) < 1 or (self.window is not None and self.window < 1):
            raise ConfigError("a cache's capacity, window and layers must be at least 1")
        if self.kind != "linear" and (self.window is None or self.window > self.capacity):
            raise ConfigError(f"a {self.kind} cache needs a window of at most its capacity {self.capacity}")

    @property
    def longest_call(self) -> int:
        """Most tokens of one call that overwrite no entry which the call still reads."""
        if self.kind != "ring" or self.window is None:
            return self.capacity
        return self.capacity - self.window + 1


@dataclass(frozen=True)
class GraphSpec:
    """One graph: tensors in order, its cache, and `aliases`: output -> input bound to the same memory.

    Only the node that writes an aliased output may read its input: no other reader is ordered before the write.
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
    """Hash n-gram tables: functions x len(sizes) of them, `rows` rows each, `dim` wide, stored as `dtype`
    (see `blt_runtime.hashing.TABLE_DTYPES`)."""

    sizes: tuple[int, ...]
    functions: int
    rows: int
    dim: int
    dtype: TableDtype = "float32"

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > LONGEST_HASH:
            raise ConfigError(f"hash sizes must be numbers from 1 to {LONGEST_HASH}, not {list(self.sizes)}")
        if not 1 <= self.functions <= len(PRIMES):
            raise ConfigError(f"a hash has 1 to {len(PRIMES)} functions, not {self.functions}")
        if self.rows < 1 or self.dim < 2:
            raise ConfigError("a hash needs rows of at least 1 and a dim of at least 2")
        if self.dtype not in TABLE_DTYPES:
            raise ConfigError(f"hash tables of the type {self.dtype!r}: {nearest(self.dtype, TABLE_DTYPES)}")

    @property
    def tables(self) -> int:
        return self.functions * len(self.sizes)


@dataclass(frozen=True)
class ModelSpec:
    """The complete description of a model for a runtime, without its weights.

    encoder_window, decoder_window: how many patches' bytes a patch reads, and how many patches a byte reads
    (both 1 in the released models). hash, entropy_hash: the hash tables of the encoder and of the entropy model. The
    n-grams of both read the ids before a position, also those of earlier documents. capacity_bytes, capacity_patches:
    what one stream can hold. chunk: most bytes per prefill call. chunk_crosses_documents: False if a call must not
    contain a change of doc_start (GroupQueryAttention).
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
    entropy_hash: HashSpec | None = None

    @property
    def hashes(self) -> dict[str, HashSpec]:
        """The hash tables of each graph that has some."""
        named = {"entropy": self.entropy_hash, "encoder": self.hash}
        return {name: hash for name, hash in named.items() if hash is not None}

    @property
    def resident(self) -> bool:
        """Whether byte states and patch vectors stay in memory of the graphs (`resident_spec`)."""
        return "encoder" in self.graphs and self.graphs["encoder"].has_input(RESIDENT["encoder"][0])

    def __post_init__(self) -> None:
        for name, graph in self.graphs.items():
            if name != graph.name:
                raise ConfigError(f"the graph {graph.name!r} is listed as {name!r}")
            if name not in GRAPHS:
                raise ConfigError(f"the graph {name!r} is unknown: {nearest(name, GRAPHS)}")
        for name in GRAPHS[1:]:
            if name not in self.graphs:
                raise ConfigError(f"the model lacks the graph {name!r}")
        if self.patch_rule.needs_entropy and "entropy" not in self.graphs:
            raise ConfigError("the patch rule needs entropies, but the model has no graph 'entropy'")
        if self.entropy_hash is not None and "entropy" not in self.graphs:
            raise ConfigError("the model has hash tables for entropies, but no graph 'entropy'")
        for field in SIZES:
            value = getattr(self, field)
            if not is_whole(value) or value < 1:
                raise ConfigError(f"{field} must be at least 1, and a whole number, not {shown(value)}")
        if self.chunk > self.capacity_bytes:
            raise ConfigError(f"chunk {self.chunk} is more than capacity_bytes {self.capacity_bytes}")
        interface = _interface(self)
        for name, graph in self.graphs.items():
            inputs, outputs = interface[name]
            _check_tensors(graph, "input", graph.inputs, inputs)
            _check_tensors(graph, "output", graph.outputs, outputs)
            _check_cache(graph, "capacity_patches" if name == "latent" else "capacity_bytes", self)


def resident_spec(spec: ModelSpec, *, cached: bool = False) -> ModelSpec:
    """The form of a model whose byte states and patch vectors never leave the graphs' memory: a host that cannot see
    this memory then moves ids, positions and logits only. Of one stream (B is 1).

    encoder: byte_states becomes an output that shares its memory with the input past_states [N, X*D]; row p holds
    position p. latent: the same for patch_kv and past_patches [R, Y*2*k*D]; its input patch_row [B, P] says which row
    each patch is written to. The latent graph and the decoder read byte_states [N, X*D], the decoder patch_kv
    [R, Y*2*k*D]. N is the capacity in bytes and one more: entries of byte_index after the end of a patch name the row
    after it. R has room for the patches of a chunk and for those before it.
    cached: the memory is [1, 1, N, ...], as TensorRT's caches are.
    """
    graphs, lead = dict(spec.graphs), (1, 1) if cached else ()
    patches = spec.chunk + spec.decoder_window + MARKS + AHEAD
    memory = {}
    for name, rows in (("encoder", spec.capacity_bytes + 1), ("latent", patches)):
        past, output = RESIDENT[name]
        tensor = graphs[name].tensor(output)
        width = math.prod(size for size in tensor.shape[2:] if isinstance(size, int))
        memory[output] = TensorSpec(output, tensor.dtype, (*lead, rows, width))
        graphs[name] = _with_memory(graphs[name], replace(memory[output], name=past), memory[output])
    latent = graphs["latent"]
    at = next(i for i, tensor in enumerate(latent.inputs) if tensor.name == "positions")
    written = TensorSpec("patch_row", "int64", ("B", "P"))
    graphs["latent"] = replace(latent, inputs=(*latent.inputs[:at], written, *latent.inputs[at:]))
    for name in ("latent", "decoder"):
        inputs = tuple(memory.get(t.name, t) for t in graphs[name].inputs)
        graphs[name] = replace(graphs[name], inputs=inputs)
    return replace(spec, graphs=graphs)


def _with_memory(graph: GraphSpec, past: TensorSpec, output: TensorSpec) -> GraphSpec:
    """The graph with an output that shares its memory with the further input `past`."""
    outputs = tuple(output if t.name == output.name else t for t in graph.outputs)
    aliases = {output.name: past.name, **graph.aliases}
    return replace(graph, inputs=(*graph.inputs, past), outputs=outputs, aliases=aliases)


def row_spec(graph: GraphSpec) -> GraphSpec:
    """The batched form of a graph: its tokens are concatenated, and belong to rows of caches [Q, heads, C, size].

    slots [Q, M, 2]: (0, token) in each place of a row. back [B, S or P, 2]: (row, place) of each token. lengths [Q]:
    entries of each row's cache after the call, in its document, at least 1. counts [Q]: tokens of each row.
    B is 1. C is any number of at least the longest length plus M; a window's cache keeps its capacity.

    Of `resident_spec`: memory of byte states has N rows, that of patch vectors R, for all rows of the batch together.
    state_row [B, S]: where the encoder writes the state of each byte, and where the decoder reads it.
    """
    clock = graph.tensor("positions").shape
    shapes = {"slots": ("Q", "M", 2), "back": (*clock, 2), "lengths": ("Q",), "counts": ("Q",)}
    if graph.name in ("encoder", "decoder") and _is_memory(graph.tensor("byte_states")):
        shapes["state_row"] = clock
    routing = tuple(TensorSpec(name, "int64", shape) for name, shape in shapes.items())
    kept = tuple(_in_rows(graph, t) for t in graph.inputs if t.name != "doc_start")
    return replace(graph, inputs=(*kept, *routing), outputs=tuple(_in_rows(graph, t) for t in graph.outputs))


def padded_spec(graph: GraphSpec) -> GraphSpec:
    """The batched form of a graph of `resident_spec(spec, cached=True)`, for engines that take no row numbers: every
    tensor has B rows, one for each stream, and a call has S (or P) tokens of each, 1 or PADDED.

    A row's tokens come first. The rest of the row, or all of an idle one, is padding: consecutive positions after the
    row's last token, whose results are overwritten before anything reads them. Memory is [B, 1, N, ...] and
    [B, 1, R, ...]. Each row writes its own: the encoder at its positions, the latent graph at its patch_row. Reads are
    of all rows together: state_row [B, S] and patch_row of the decoder, and byte_index of the latent graph, count from
    the first row's memory on (row * N + position, row * R + patch mod R).
    """
    inputs, outputs = (tuple(map(_each_row, tensors)) for tensors in (graph.inputs, graph.outputs))
    if graph.name == "decoder":
        inputs = (*inputs, TensorSpec("state_row", "int64", graph.tensor("positions").shape))
    return replace(graph, inputs=inputs, outputs=outputs)


def _each_row(tensor: TensorSpec) -> TensorSpec:
    return replace(tensor, shape=("B", *tensor.shape[1:])) if _is_memory(tensor) else tensor


def table_spec(graph: GraphSpec, hash: HashSpec) -> GraphSpec:
    """The form of the encoder that gathers from hash tables in memory of a device: hash_rows [B, S, T] (rows of all
    tables, counted from the first) and hash_tables [T * rows, D] in place of hash_embedding."""
    clock = graph.tensor("positions").shape
    rows = TensorSpec("hash_rows", "int64", (*clock, hash.tables))
    tables = TensorSpec("hash_tables", hash.dtype, (hash.tables * hash.rows, hash.dim))
    kept = tuple(tensor for tensor in graph.inputs if tensor.name != "hash_embedding")
    return replace(graph, inputs=(*kept, rows, tables))


def _is_memory(tensor: TensorSpec) -> bool:
    """Whether the tensor is the memory of `resident_spec`: no other form has fixed sizes only."""
    names = {name for pair in RESIDENT.values() for name in pair}
    return tensor.name in names and all(isinstance(size, int) for size in tensor.shape)


def _in_rows(graph: GraphSpec, tensor: TensorSpec) -> TensorSpec:
    if _is_memory(tensor):
        return replace(tensor, shape=("N" if "states" in tensor.name else "R", tensor.shape[-1]))
    if tensor.name not in graph.aliases and tensor.name not in graph.aliases.values():
        return tensor
    _, heads, slots, size = tensor.shape
    evicts = graph.cache is not None and graph.cache.kind != "linear"
    return replace(tensor, shape=("Q", heads, slots if evicts else "C", size))


def _interface(spec: ModelSpec) -> dict[str, tuple[dict[str, Shape], dict[str, Shape]]]:
    """Inputs and outputs of each graph without its caches: the tensors that a stream binds."""
    byte: Shape = ("B", "S")
    patch: Shape = ("B", "P")
    kv: Shape = (None, 2, None, None)
    byte_clock, patch_clock = ({"positions": clock, "doc_start": clock} for clock in (byte, patch))
    hashed: dict[str, dict[str, Shape]] = {"encoder": {}, "entropy": {}}
    hashed |= {name: {"hash_embedding": (*byte, hash.dim)} for name, hash in spec.hashes.items()}
    entropy = ({"ids": byte, **hashed["entropy"], **byte_clock}, {"entropy": byte, "logits": (*byte, None)})
    encoder = {"ids": byte, **hashed["encoder"], **byte_clock}
    own_start = {"own_start": patch} if spec.encoder_window > 1 else {}
    states: Shape = (*byte, None, None)
    pool: dict[str, Shape] = {"byte_states": ("N", None, None), "byte_index": (*patch, "L"), "patch_length": patch}
    patches: dict[str, Shape] = {"patch_kv": ("R", *kv), "patch_row": (*byte, spec.decoder_window)}
    if spec.resident:
        memory: Shape = (None,) * len(spec.graphs["encoder"].tensor("past_states").shape)
        pool |= {"byte_states": memory, "patch_row": patch}
        return {
            "entropy": entropy,
            "encoder": (encoder, {}),
            "latent": ({**pool, **own_start, **patch_clock}, {}),
            "decoder": (
                {**patches, "byte_states": memory, "patch_kv": memory, **byte_clock},
                {"logits": (*byte, spec.vocab_size)},
            ),
        }
    return {
        "entropy": entropy,
        "encoder": (encoder, {"byte_states": states}),
        "latent": ({**pool, **own_start, **patch_clock}, {"patch_kv": (*patch, *kv)}),
        "decoder": ({"byte_states": states, **patches, **byte_clock}, {"logits": (*byte, spec.vocab_size)}),
    }


def _check_tensors(graph: GraphSpec, kind: str, tensors: tuple[TensorSpec, ...], wanted: dict[str, Shape]) -> None:
    """Raises ConfigError unless the tensors that are not caches are exactly the wanted ones."""
    caches = {*graph.aliases, *graph.aliases.values()}
    found = {t.name: t for t in tensors if t.name not in caches}
    for name in [n for n in wanted if n not in found]:
        raise ConfigError(f"graph {graph.name!r} lacks the {kind} {name!r}")
    for name, tensor in found.items():
        if name not in wanted:
            raise ConfigError(f"graph {graph.name!r} has the unknown {kind} {name!r}")
        if (tensor.dtype == "int64") != (name in _INTEGERS):
            raise ConfigError(f"graph {graph.name!r}: {name!r} must not be {tensor.dtype}")
        if not _fits(tensor.shape, wanted[name]):
            shape = ", ".join("a number" if size is None else str(size) for size in wanted[name])
            raise ConfigError(f"graph {graph.name!r}: {name!r} has the shape {list(tensor.shape)}, not [{shape}]")


def _fits(shape: tuple[int | str, ...], wanted: Shape) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(isinstance(a, int) if b is None else a == b for a, b in zip(shape, wanted, strict=True))


def _check_cache(graph: GraphSpec, limit: str, spec: ModelSpec) -> None:
    """Raises ConfigError unless the cache is as long as its tensors, and a linear one holds a whole stream."""
    cache, tokens = graph.cache, getattr(spec, limit)
    if cache is None or not graph.aliases:
        if cache is not None or graph.aliases:
            raise ConfigError(f"graph {graph.name!r} must have 'cache' and cache tensors, or neither")
        return
    for output, source in graph.aliases.items():
        past, present = graph.tensor(source), graph.tensor(output)
        resident = RESIDENT.get(graph.name) == (source, output)
        if not resident and not _fits(past.shape, ("B", None, cache.capacity, None)):
            raise ConfigError(f"graph {graph.name!r}: {source!r} must be [B, heads, {cache.capacity}, head size]")
        if (past.shape, past.dtype) != (present.shape, present.dtype):
            raise ConfigError(f"graph {graph.name!r}: {output!r} and {source!r} differ in shape or type")
    if cache.kind == "linear" and cache.capacity < tokens:
        raise ConfigError(f"graph {graph.name!r}: a linear cache of {cache.capacity} is below {limit} {tokens}")

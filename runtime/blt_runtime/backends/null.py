"""A backend with fake graphs in numpy. Their outputs depend on everything that a host can get wrong.

Its "attention" reads the same caches, with the same layouts and visibility rules, as the real graphs, so a
wrong ring slot, a chunk across documents, a lost patch or a stale hash shows in the output. All values are
small whole numbers in float32, so chunked and single steps agree bit for bit. Tests of loops, servers and
callers run on it without any library.

Letters: S tokens of the call, C cache slots, P patches, L longest patch, W patches that a byte reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ..bundle.spec import CacheKind, CacheSpec, GraphSpec, HashSpec, ModelSpec, TensorSpec
from ..errors import BackendError
from ..ids import VOCAB
from ..patching import PatchRule
from .protocol import Array, Buffer, Call, HostBuffer, Place

MODULUS = 251
WIDTH = 4
SLICES = 2
NATS = 50.0
"""Entropies are whole numbers below MODULUS divided by this: 0 to 5 nats."""


class NullBackend:
    """Runs the fake graphs of a ModelSpec made by `null_spec`. `calls` counts the calls per graph."""

    name = "null"

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.calls = dict.fromkeys(spec.graphs, 0)
        self._sessions = {name: NullSession(self, graph) for name, graph in spec.graphs.items()}

    def session(self, group: str) -> NullSession:
        return self._sessions[group]

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> HostBuffer:
        return HostBuffer(dtype, shape)


class NullSession:
    """One fake graph."""

    def __init__(self, backend: NullBackend, spec: GraphSpec) -> None:
        self.spec = spec
        self._backend = backend

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        tensors = {t.name for t in (*self.spec.inputs, *self.spec.outputs)}
        if tensors != set(buffers):
            raise BackendError(f"graph {self.spec.name!r}: bound {sorted(buffers)}, has {sorted(tensors)}")
        arrays = {name: buffer.array for name, buffer in buffers.items()}
        body = _BODIES[self.spec.name]
        if self._backend.spec.resident:
            body = partial(_in_memory, self.spec.name)

        def call() -> None:
            self._backend.calls[self.spec.name] += 1
            body(arrays, self._attend)

        return call

    def _attend(self, value_S: Array, arrays: Mapping[str, Array]) -> Array:
        """Stores one value per token in the cache and mixes the values visible to each token, weighted by distance."""
        cache = self.spec.cache
        assert cache is not None
        position_S, document_S = arrays["positions"][0], arrays["doc_start"][0]
        slots_C = arrays["past_key.0"].reshape(-1)
        if (np.diff(position_S) != 1).any() or len(position_S) > cache.longest_call:
            raise BackendError(f"graph {self.spec.name!r}: positions not consecutive or call too long")
        if cache.kind == "window" or not self._backend.spec.chunk_crosses_documents:
            held = _restarting(cache, slots_C, position_S, document_S, value_S)
        else:
            held = _by_position(cache, slots_C, position_S, value_S)
        return np.array([_mix(held, t, d, cache.window) for t, d in zip(position_S, document_S, strict=True)])


def _by_position(cache: CacheSpec, slots_C: Array, position_S: Array, value_S: Array) -> dict[int, float]:
    """Portable layout: position p in slot p mod C. Returns the assumed value of each visible position."""
    capacity, last = cache.capacity, int(position_S[-1])
    if position_S[0] // capacity != last // capacity:
        raise BackendError("a call crosses a multiple of the cache's capacity")
    slots_C[position_S % capacity] = value_S
    return {last - (last - s) % capacity: float(slots_C[s]) for s in range(capacity)}


def _restarting(
    cache: CacheSpec, slots_C: Array, position_S: Array, document_S: Array, value_S: Array
) -> dict[int, float]:
    """GroupQueryAttention's layout: the resident positions of one document, in order, from slot 0."""
    document = int(document_S[0])
    if (document_S != document).any():
        raise BackendError("a call contains a change of document")
    before, after = int(position_S[0]) - document, int(position_S[-1]) + 1 - document
    if cache.kind == "linear" and after > cache.capacity:
        raise BackendError("a linear cache overflows")
    resident = slots_C[: _resident(cache, before)].tolist() + value_S.tolist()
    first = after - len(resident)
    kept = resident[len(resident) - _resident(cache, after) :]
    slots_C[:] = -1  # what the operator leaves unspecified
    slots_C[: len(kept)] = kept
    return {document + first + i: value for i, value in enumerate(resident)}


def _resident(cache: CacheSpec, tokens: int) -> int:
    """L(T) of the operator's documentation."""
    if cache.kind == "linear" or tokens <= cache.capacity:
        return tokens
    assert cache.window is not None
    step = cache.capacity - cache.window + 1
    return tokens - step * -(-(tokens - cache.capacity) // step)


def _mix(held: Mapping[int, float], t: int, document: int, window: int | None) -> float:
    first = document if window is None else max(document, t - window + 1)
    return sum((held[p] + 1) * (1 + (t - p) % 7) for p in range(first, t + 1)) % MODULUS


def _bytes(arrays: Mapping[str, Array]) -> Array:
    """One value per token, of its id and its hash embedding."""
    value_S: Array = arrays["ids"][0] % MODULUS
    if "hash_embedding" in arrays:
        value_S = (value_S + arrays["hash_embedding"][0].sum(axis=-1)) % MODULUS
    return value_S


def _entropy(arrays: Mapping[str, Array], attend: Any) -> None:
    mix_S = attend(_bytes(arrays), arrays)
    arrays["entropy"][0] = mix_S / NATS
    arrays["logits"][0] = _peaks(mix_S)


def _encoder(arrays: Mapping[str, Array], attend: Any) -> None:
    states = arrays["byte_states"][0]
    grid = np.arange(states[0].size).reshape(states[0].shape)
    states[...] = (attend(_bytes(arrays), arrays)[:, None, None] + grid) % MODULUS


def _latent(arrays: Mapping[str, Array], attend: Any) -> None:
    states_N = arrays["byte_states"].sum(axis=(1, 2))
    length_P = arrays["patch_length"][0]
    own_P = arrays["own_start"][0] if "own_start" in arrays else np.zeros_like(length_P)
    value_P = np.empty(len(length_P))
    for p, (rows_L, length, own) in enumerate(zip(arrays["byte_index"][0], length_P, own_P, strict=True)):
        weights = np.arange(1, length + 1) + 13 * (np.arange(length) >= own)
        value_P[p] = (states_N[rows_L[:length]] * weights).sum() % MODULUS
    kv = arrays["patch_kv"][0]
    grid = np.arange(kv[0].size).reshape(kv[0].shape)
    kv[...] = (attend(value_P, arrays).reshape(-1, 1, 1, 1, 1) + grid) % MODULUS


def _decoder(arrays: Mapping[str, Array], attend: Any) -> None:
    mix_S = attend(arrays["byte_states"][0].sum(axis=(1, 2)) % MODULUS, arrays)
    row_SW = arrays["patch_row"][0]
    read_SW = np.where(row_SW >= 0, arrays["patch_kv"].reshape(len(arrays["patch_kv"]), -1)[row_SW, 0] + 1, 0)
    read_S = (read_SW * np.arange(1, row_SW.shape[1] + 1)).sum(axis=-1)
    arrays["logits"][0] = _peaks(mix_S * 5 + read_S * 3)


def _peaks(value_S: Array) -> Array:
    """Logits with one highest id per token, falling off on both sides."""
    return np.asarray(-np.abs(np.arange(VOCAB) - (value_S % VOCAB)[:, None]) / 8)


def _in_memory(name: str, arrays: Mapping[str, Array], attend: Any) -> None:
    """A graph of `resident_spec`, by the body of the other form: what that returns is written to the memory."""
    local = dict(arrays)
    if name == "encoder":
        position_S = arrays["positions"][0]
        local["byte_states"] = np.empty((1, len(position_S), 1, WIDTH), np.float32)
        _encoder(local, attend)
        arrays["byte_states"][position_S] = local["byte_states"].reshape(-1, WIDTH)
    elif name == "latent":
        row_P = arrays["patch_row"][0]
        local["byte_states"] = arrays["byte_states"].reshape(-1, 1, WIDTH)
        local["patch_kv"] = np.empty((1, len(row_P), 1, 2, SLICES, WIDTH), np.float32)
        _latent(local, attend)
        arrays["patch_kv"][row_P] = local["patch_kv"].reshape(len(row_P), -1)
    elif name == "decoder":
        local["byte_states"] = arrays["byte_states"][arrays["positions"]].reshape(1, -1, 1, WIDTH)
        _decoder(local, attend)
    else:
        _entropy(local, attend)


_BODIES = {"entropy": _entropy, "encoder": _encoder, "latent": _latent, "decoder": _decoder}


def null_spec(
    rule: PatchRule | None = None,
    *,
    local_kind: CacheKind = "ring",
    window: int = 8,
    slack: int = 8,
    chunk: int = 8,
    capacity_bytes: int = 512,
    capacity_patches: int = 256,
    encoder_window: int = 1,
    decoder_window: int = 1,
    hash: HashSpec | None = None,
    entropy_hash: HashSpec | None = None,
    latent_document_mask: bool = True,
    entropy: bool = True,
    latent: CacheSpec | None = None,
) -> ModelSpec:
    """A ModelSpec for NullBackend. local_kind "ring" gives portable layouts, "window" ONNX Runtime's. latent: its
    cache, linear by default."""
    local = CacheSpec(local_kind, window + slack, window, 1)
    graphs = {
        "entropy": _graph(
            "entropy", local, _byte_inputs(entropy_hash), [_f32("entropy", "B", "S"), _f32("logits", "B", "S", VOCAB)]
        ),
        "encoder": _graph(
            "encoder",
            local,
            _byte_inputs(hash),
            [_f32("byte_states", "B", "S", 1, WIDTH)],
        ),
        "latent": _graph(
            "latent",
            latent or CacheSpec("linear", capacity_patches, None, 1),
            [
                _f32("byte_states", "N", 1, WIDTH),
                _i64("byte_index", "B", "P", "L"),
                _i64("patch_length", "B", "P"),
                *([_i64("own_start", "B", "P")] if encoder_window > 1 else []),
            ],
            [_f32("patch_kv", "B", "P", 1, 2, SLICES, WIDTH)],
        ),
        "decoder": _graph(
            "decoder",
            local,
            [
                _f32("byte_states", "B", "S", 1, WIDTH),
                _f32("patch_kv", "R", 1, 2, SLICES, WIDTH),
                _i64("patch_row", "B", "S", decoder_window),
            ],
            [_f32("logits", "B", "S", VOCAB)],
        ),
    }
    if not entropy:
        del graphs["entropy"]
    return ModelSpec(
        vocab_size=VOCAB,
        hash=hash,
        patch_rule=rule or PatchRule("entropy", threshold=3.5),
        encoder_window=encoder_window,
        decoder_window=decoder_window,
        capacity_bytes=capacity_bytes,
        capacity_patches=capacity_patches,
        chunk=chunk,
        chunk_crosses_documents=local_kind != "window",
        latent_document_mask=latent_document_mask,
        graphs=graphs,
        entropy_hash=entropy_hash,
    )


def _graph(name: str, cache: CacheSpec, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> GraphSpec:
    letter = "P" if name == "latent" else "S"
    clocks = [_i64("positions", "B", letter), _i64("doc_start", "B", letter)]
    past, present = _f32("past_key.0", "B", 1, cache.capacity, 1), _f32("present_key.0", "B", 1, cache.capacity, 1)
    return GraphSpec(name, (*inputs, *clocks, past), (*outputs, present), {"present_key.0": "past_key.0"}, cache)


def _byte_inputs(hash: HashSpec | None) -> list[TensorSpec]:
    return [_i64("ids", "B", "S"), *([_f32("hash_embedding", "B", "S", hash.dim)] if hash else [])]


def _i64(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)

"""The interface of the four step modules: tensor names, shapes, caches and limits.

One description serves the modules run directly, both exported flavours and the bundle's manifest. Letters as in
`blt_runtime.bundle.spec`: the sizes B, S, N, P, L, R vary from call to call, everything else is a number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig
from blt_runtime.arguments import is_whole
from blt_runtime.bundle.spec import CacheSpec, GraphSpec, HashSpec, ModelSpec, TensorSpec
from blt_runtime.errors import ConfigError, OutOfMemory, shown
from blt_runtime.hashing import TableDtype
from blt_runtime.patching import PatchRule

CHUNK = 128
"""Bytes per prefill call: large enough that arithmetic dominates, small enough that a ring of window + chunk slots is
hardly slower to read than a ring of window slots."""
ALIGN = 64
WindowLayout = Literal["ring", "window", "linear"]
"""ring, window: the newest positions only (`CacheSpec`). linear: all positions, the window is an attention mask."""


@dataclass(frozen=True)
class Limits:
    """The capacity of a stream in bytes and patches, and the largest call in bytes."""

    bytes: int
    patches: int
    chunk: int = CHUNK

    @classmethod
    def of(
        cls, config: BLTConfig, capacity: int | None = None, patches: int | None = None, chunk: int = CHUNK
    ) -> Limits:
        """The trained lengths by default. `capacity` (bytes) may exceed them, because rotary tables extend. Raises
        ConfigError for anything but whole numbers of at least 1."""
        for name, value in (("capacity", capacity), ("patches", patches), ("chunk", chunk)):
            if value is not None and not (is_whole(value) and value >= 1):
                raise ConfigError(
                    f"capacity, patches and chunk must each be at least 1, and whole numbers: {name} is {shown(value)}"
                )
        n_bytes = min(config.encoder.max_seqlen, config.decoder.max_seqlen) if capacity is None else int(capacity)
        n_patches = max(config.latent.max_seqlen, capacity or 0) if patches is None else int(patches)
        return cls(n_bytes, min(n_patches, n_bytes), min(chunk, n_bytes))


def check_memory(spec: ModelSpec) -> None:
    """Raises OutOfMemory for a capacity whose rotary tables and positions alone exceed this machine's memory. They are
    written as soon as a model is made; caches are not, until a text reaches them."""
    needed = 12 * spec.capacity_bytes
    for name, graph in spec.graphs.items():
        if graph.cache is None:
            continue
        _, _, _, head_size = graph.tensor("past_key.0").shape
        assert isinstance(head_size, int)
        needed += 4 * head_size * (spec.capacity_patches if name == "latent" else spec.capacity_bytes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise OutOfMemory(
            f"not enough memory: a capacity of {spec.capacity_bytes:,} bytes and {spec.capacity_patches:,} patches "
            f"needs {needed:,} bytes for positions alone, and this machine has {memory:,}: choose a smaller --capacity"
        )


def cache_spec(config: TransformerConfig, capacity: int, chunk: int, layout: WindowLayout) -> CacheSpec | None:
    """A ring cache (or a window cache) for windowed layers, a plain buffer of `capacity` positions for others; None
    without layers."""
    if not config.n_layers:
        return None
    if config.window is None or config.window + chunk >= capacity or layout == "linear":
        return CacheSpec("linear", capacity, config.window, config.n_layers)
    slots = ALIGN * -(-(config.window - 1 + chunk) // ALIGN)
    return CacheSpec(layout, slots, config.window, config.n_layers)


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _i64(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _graph(
    name: str,
    config: TransformerConfig,
    cache: CacheSpec | None,
    *,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
) -> GraphSpec:
    """A graph with positions, document starts and caches added to its own inputs and outputs."""
    length = "P" if name == "latent" else "S"
    names = [f"{kind}.{layer}" for layer in range(config.n_layers) for kind in ("key", "value")]
    shape = ("B", config.kv_heads, cache.capacity if cache else 0, config.head_size)
    past = [_f32(f"past_{name}", *shape) for name in names]
    present = [_f32(f"present_{name}", *shape) for name in names]
    return GraphSpec(
        name,
        (*inputs, _i64("positions", "B", length), _i64("doc_start", "B", length), *past),
        (*outputs, *present),
        {f"present_{name}": f"past_{name}" for name in names},
        cache,
    )


def model_spec(
    config: BLTConfig,
    entropy: EntropyConfig | None,
    rule: PatchRule,
    limits: Limits,
    *,
    layout: WindowLayout = "ring",
    chunk_crosses_documents: bool = True,
    table_dtypes: Mapping[str, TableDtype] | None = None,
) -> ModelSpec:
    """The specification of the whole model, with windowed caches of `layout`. table_dtypes: of the hash tables by graph
    ("encoder", "entropy"; default: float32)."""
    dtypes = table_dtypes or {}
    D, X, Y = config.local_dim, config.encoder_cross_layers, config.decoder_cross_layers
    kv = (Y, 2, config.cross_k, D)
    ids = _i64("ids", "B", "S")
    hashed, entropy_hashed = _hashed(config.hash, D), _hashed(entropy.hash, entropy.dim) if entropy else []
    own_start = [_i64("own_start", "B", "P")] if config.encoder_cross_window > 1 else []
    local = {
        name: cache_spec(stack, capacity=limits.bytes, chunk=limits.chunk, layout=layout)
        for name, stack in _byte_stacks(config, entropy).items()
    }
    latent = cache_spec(config.latent, capacity=limits.patches, chunk=limits.chunk, layout=layout)
    graphs = {
        "encoder": _graph(
            "encoder",
            config.encoder,
            local["encoder"],
            inputs=[ids, *hashed],
            outputs=[_f32("byte_states", "B", "S", X, D)],
        ),
        "latent": _graph(
            "latent",
            config.latent,
            latent,
            inputs=[
                _f32("byte_states", "N", X, D),
                _i64("byte_index", "B", "P", "L"),
                _i64("patch_length", "B", "P"),
                *own_start,
            ],
            outputs=[_f32("patch_kv", "B", "P", *kv)],
        ),
        "decoder": _graph(
            "decoder",
            config.decoder,
            local["decoder"],
            inputs=[
                _f32("byte_states", "B", "S", X, D),
                _f32("patch_kv", "R", *kv),
                _i64("patch_row", "B", "S", config.decoder_cross_window),
            ],
            outputs=[_f32("logits", "B", "S", config.vocab_size)],
        ),
    }
    if entropy is not None:
        outputs = [_f32("entropy", "B", "S"), _f32("logits", "B", "S", entropy.vocab_size)]
        graphs["entropy"] = _graph("entropy", entropy, local["entropy"], inputs=[ids, *entropy_hashed], outputs=outputs)
    return ModelSpec(
        vocab_size=config.vocab_size,
        hash=_hash_spec(config.hash, D, dtypes.get("encoder")),
        entropy_hash=_hash_spec(entropy.hash, entropy.dim, dtypes.get("entropy")) if entropy else None,
        patch_rule=rule,
        encoder_window=config.encoder_cross_window,
        decoder_window=config.decoder_cross_window,
        capacity_bytes=limits.bytes,
        capacity_patches=limits.patches,
        chunk=limits.chunk,
        chunk_crosses_documents=chunk_crosses_documents,
        latent_document_mask=config.latent_document_mask,
        graphs=graphs,
    )


def _hashed(config: HashConfig | None, dim: int) -> list[TensorSpec]:
    """The input that a graph with hash tables has."""
    return [_f32("hash_embedding", "B", "S", dim)] if config else []


def _hash_spec(config: HashConfig | None, dim: int, dtype: TableDtype | None) -> HashSpec | None:
    return HashSpec(config.sizes, config.functions, config.rows, dim, dtype or "float32") if config else None


def _byte_stacks(config: BLTConfig, entropy: EntropyConfig | None) -> dict[str, TransformerConfig]:
    stacks: dict[str, TransformerConfig] = {"encoder": config.encoder, "decoder": config.decoder}
    return stacks if entropy is None else {**stacks, "entropy": entropy}

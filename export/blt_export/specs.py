"""What the exported graphs promise: names, shapes and cache layouts of one model in one flavour.

Cache layouts
    window layers, portable: ring of C slots, C = window - 1 + chunk rounded up to 64, so that a whole chunk can be
        written before its first token reads its window
    window layers, ort: GroupQueryAttention's sliding cache of the same C (it evicts C - window + 1 entries at once)
    other layers: linear, as long as the stream
"""

from __future__ import annotations

from typing import Literal

from blt.checkpoint import Checkpoint
from blt.model import BLTConfig, TransformerConfig
from blt_runtime.errors import UsageError
from blt_runtime.spec import CacheSpec, GraphSpec, HashSpec, ModelSpec, TensorSpec

from .lower import ort

Flavour = Literal["ort", "portable"]
FLAVOURS: tuple[Flavour, ...] = ("ort", "portable")
_ALIGN = 64


def model_spec(checkpoint: Checkpoint, flavour: Flavour, capacity: int | None = None, patches: int | None = None,
               chunk: int = 128) -> ModelSpec:
    """`capacity` bytes and `patches` a stream (default: the lengths of the model's rotary tables), `chunk` bytes a call.

    Raises CheckpointError if the checkpoint cannot generate, UsageError for sizes that make no sense.
    """
    blt, rule = checkpoint.require_blt()
    config = blt.config
    capacity = config.encoder.max_seqlen if capacity is None else capacity
    patches = min(config.latent.max_seqlen, capacity) if patches is None else patches
    if min(capacity, patches, chunk) < 1:
        raise UsageError(f"capacity {capacity}, patches {patches} and chunk {chunk} must be at least 1")
    chunk = min(chunk, capacity)
    sizes = _Sizes(flavour, capacity, patches, chunk)
    graphs = _blt_graphs(config, sizes)
    if checkpoint.entropy is not None and rule.needs_entropy:
        graphs = {"entropy": _entropy_graph(checkpoint.entropy.config, sizes), **graphs}
    return ModelSpec(
        vocab_size=config.vocab_size, hash=_hash(config), patch_rule=rule, encoder_window=config.encoder_cross_window,
        decoder_window=config.decoder_cross_window, capacity_bytes=capacity, capacity_patches=patches, chunk=chunk,
        chunk_crosses_documents=flavour == "portable", latent_document_mask=config.latent_document_mask, graphs=graphs)


class _Sizes:
    """The cache layout of each stack, from the flavour and the stream's limits."""

    def __init__(self, flavour: Flavour, capacity: int, patches: int, chunk: int) -> None:
        self.flavour, self.capacity, self.patches, self.chunk = flavour, capacity, patches, chunk

    def cache(self, stack: TransformerConfig, positions: int) -> CacheSpec:
        if stack.window is None:
            return CacheSpec("linear", positions, None, stack.n_layers)
        ring = self.flavour == "portable" or not ort.takes_head_size(stack.head_size)
        slots = _ALIGN * -(-(stack.window - 1 + self.chunk) // _ALIGN)
        return CacheSpec("ring" if ring else "window", slots, stack.window, stack.n_layers)


def _hash(config: BLTConfig) -> HashSpec | None:
    if config.hash is None:
        return None
    return HashSpec(config.hash.sizes, config.hash.functions, config.hash.rows, config.local_dim)


def _int(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _float(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _graph(name: str, stack: TransformerConfig, cache: CacheSpec, inputs: list[TensorSpec],
           outputs: list[TensorSpec]) -> GraphSpec:
    """Adds the caches: past_key.0, past_value.0, past_key.1, ... and the same of `present`."""
    shape = ("B", stack.kv_heads, cache.capacity, stack.head_size)
    names = [f"{part}.{layer}" for layer in range(cache.layers) for part in ("key", "value")]
    return GraphSpec(
        name,
        (*inputs, *(_float(f"past_{n}", *shape) for n in names)),
        (*outputs, *(_float(f"present_{n}", *shape) for n in names)),
        {f"present_{n}": f"past_{n}" for n in names},
        cache,
    )


def _entropy_graph(config: TransformerConfig, sizes: _Sizes) -> GraphSpec:
    inputs = [_int("ids", "B", "S"), _int("positions", "B", "S"), _int("doc_start", "B", "S")]
    outputs = [_float("entropy", "B", "S"), _float("logits", "B", "S", getattr(config, "vocab_size", 260))]
    return _graph("entropy", config, sizes.cache(config, sizes.capacity), inputs, outputs)


def _blt_graphs(config: BLTConfig, sizes: _Sizes) -> dict[str, GraphSpec]:
    encoder_x, decoder_x, width = config.encoder_cross_layers, config.decoder_cross_layers, config.local_dim
    place, patch_place = ([_int(n, "B", letter) for n in ("positions", "doc_start")] for letter in "SP")
    states = _float("byte_states", "B", "S", encoder_x, width)
    hashed = [_float("hash_embedding", "B", "S", width)] if config.hash else []
    own = [_int("own_start", "B", "P")] if config.encoder_cross_window > 1 else []
    patch_kv = (decoder_x, 2, config.cross_k, width)
    latent_inputs = [_float("byte_states", "N", encoder_x, width), _int("byte_index", "B", "P", "L"),
                     _int("patch_length", "B", "P"), *own, *patch_place]
    decoder_inputs = [states, _float("patch_kv", "R", *patch_kv), _int("patch_row", "B", "S", config.decoder_cross_window),
                      *place]
    return {
        "encoder": _graph("encoder", config.encoder, sizes.cache(config.encoder, sizes.capacity),
                          [_int("ids", "B", "S"), *hashed, *place], [states]),
        "latent": _graph("latent", config.latent, sizes.cache(config.latent, sizes.patches), latent_inputs,
                         [_float("patch_kv", "B", "P", *patch_kv)]),
        "decoder": _graph("decoder", config.decoder, sizes.cache(config.decoder, sizes.capacity), decoder_inputs,
                          [_float("logits", "B", "S", config.vocab_size)]),
    }

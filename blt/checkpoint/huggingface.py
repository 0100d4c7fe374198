"""Hugging Face folders of `BltForCausalLM`: `config.json`, and `model.safetensors` as one file or in shards.

The name map is a table of both names; the configuration is read in `huggingface_config` and written in
`huggingface_write`. One difference is in the weights and not in their names: where transformers groups the key/value
heads of a local stack, it also groups those of the stack's cross-attention, which this project never does. Reading
repeats each head's rows for every head of its group. Writing a grouped local stack repeats the rows of its
self-attention. Both compute exactly the same.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from blt.checkpoint import huggingface_config, huggingface_write
from blt.checkpoint.source import Source, fit_weights, read_json
from blt.checkpoint.tensors import StoredTensor, read_safetensors, write_safetensors
from blt.files import staged
from blt.model.config import BLTConfig, TransformerConfig
from blt_runtime import reading
from blt_runtime.errors import CheckpointError, shown

log = logging.getLogger(__name__)
SPEC = "docs/spec.md, section 12"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HASH_TENSOR = "model.encoder_hash_tok_embedding.weight"
PATCHER = "model.patcher."

LAYER = (
    ("attention_norm", "input_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
)
CROSS = (
    ("q_norm", "q_norm"),
    ("kv_norm", "k_norm"),
    ("wq", "q_proj"),
    ("wk", "k_proj"),
    ("wv", "v_proj"),
    ("wo", "o_proj"),
)
STACKS = {
    "encoder": "model.local_encoder",
    "latent": "model.global_transformer",
    "decoder": "model.local_decoder",
}
LOCAL = {name: STACKS[name] for name in ("encoder", "decoder")}
# our name, their name; # is the number of a layer, and .weight follows every name
BLT_NAMES = (
    ("hash_embedding.tables", "model.encoder_hash_tok_embedding"),
    ("encoder.byte_embedding", "model.local_encoder.embed_tokens"),
    ("encoder.patch_projection", "model.local_encoder.patch_embedding_projection"),
    ("latent.projection", "model.global_transformer.token_embedding_projection"),
    ("decoder.patch_projection", "model.local_decoder.patch_embedding_projection"),
    ("decoder.norm", "model.local_decoder.norm"),
    ("decoder.output", "lm_head"),
    *((f"{a}.layers.#.{x}", f"{b}.layers.#.{y}") for a, b in STACKS.items() for x, y in LAYER),
    *((f"{a}.cross.#.{x}", f"{b}.cross_attn_layers.#.{y}") for a, b in LOCAL.items() for x, y in CROSS),
)
ENTROPY_NAMES = (
    ("byte_embedding", "model.patcher.embed_tokens"),
    ("norm", "model.patcher.norm"),
    ("output", "model.patcher.lm_head"),
    *((f"layers.#.{x}", f"model.patcher.layers.#.{y}") for x, y in LAYER),
)
THEIRS = dict((*BLT_NAMES, *ENTROPY_NAMES))
UNUSED = re.compile(r".*rotary_emb\..*")
"""Buffers that no version of transformers reads."""


def huggingface_name(name: str) -> str:
    """The Hugging Face name of one of our parameters, of the BLT or of the entropy model."""
    layer = re.search(r"\.(\d+)\.", name)
    general = name.removesuffix(".weight")
    if layer is None:
        return THEIRS[general] + ".weight"
    return THEIRS[general.replace(layer[0], ".#.", 1)].replace("#", layer[1]) + ".weight"


def matches(path: Path) -> bool:
    """A folder whose config.json has model_type blt; the text is searched, so that a damaged file matches, too."""
    try:
        text = reading.read_bytes(reading.in_folder(path, CONFIG)).decode(errors="replace")
    except OSError:
        return False
    return re.search(r'"model_type"\s*:\s*"blt"', text) is not None


# --- reading -------------------------------------------------------------------------------------------------


def read(path: Path) -> Source:
    """The checkpoint in a folder; weights stay in their files. Raises CheckpointError."""
    where = str(path / CONFIG)
    config = huggingface_config.parse_config(read_json(path / CONFIG), where)
    blt_config, entropy_config, rule = huggingface_config.our_configs(config, where)
    found = {n: t for n, t in read_safetensors(*weight_files(path)).items() if not UNUSED.fullmatch(n)}
    patcher = {name: found.pop(name) for name in list(found) if name.startswith(PATCHER)}
    if blt_config.hash is None:
        found.pop(HASH_TENSOR, None)  # it has no rows
    blt = fit_weights(blt_config, _ungrouped(blt_config, found), _names, where=path)
    entropy = None
    if patcher and entropy_config is not None:
        entropy = fit_weights(entropy_config, patcher, _names, where=path)
    elif patcher:
        log.warning("%s: patch_in_forward is false, so the weights of the patcher are not read", where)
    return Source("huggingface", path, blt=blt, entropy=entropy, patch_rule=rule).check_vocabularies()


def _names(ours: str) -> list[str]:
    return [huggingface_name(ours)]


def weight_files(path: Path) -> list[Path]:
    """The weight file, or the shards that the index names; they must be plain names of files in the folder."""
    if not (path / INDEX).is_file():
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}; save the model with safetensors")
        return [_inside(path, WEIGHTS)]
    index = read_json(path / INDEX)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    return [_inside(path, name) for name in sorted({str(name) for name in shards.values()})]


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder. Its readers check links (`blt_runtime.reading`)."""
    if PurePath(name).name != name or name in ("", "..") or "\\" in name:
        raise CheckpointError(f"{folder / INDEX} names {shown(name)}, which is not a plain file name; it is refused")
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} does not exist; copy all shards")
    return folder / name


def _ungrouped(config: BLTConfig, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors with the key/value heads of grouped cross-attention repeated."""
    out = dict(found)
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        kind = re.compile(re.escape(STACKS[side]) + r"\.cross_attn_layers\.\d+\.[kv]_proj\.weight")
        out |= {name: _repeat_heads(tensor, stack) for name, tensor in found.items() if kind.fullmatch(name)}
    return out


def _repeat_heads(tensor: StoredTensor, stack: TransformerConfig) -> StoredTensor:
    """Repeats the rows of each key/value head for every head of its group, as views: nothing is copied."""
    group = stack.n_heads // stack.kv_heads
    if group == 1 or tensor.shape != (stack.kv_heads * stack.head_size, stack.dim):
        return tensor
    (rows,) = tensor.pieces
    pieces = tuple(head for head in rows.split(stack.head_size) for _ in range(group))
    return StoredTensor(tensor.names * len(pieces), pieces, tensor.mapped)


# --- writing -------------------------------------------------------------------------------------------------


def check(source: Source) -> None:
    """Raises CheckpointError that lists everything that transformers cannot represent; no weight is read."""
    found = huggingface_write.obstacles(source)
    if found:
        raise CheckpointError(f"{source.path}: transformers cannot represent ({SPEC}): " + "; ".join(found))


def write(source: Source, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a folder for `BltForCausalLM.from_pretrained`, streamed and atomically; an older folder is replaced.

    dtype: of the stored weights (default: unchanged). A warning names every setting that the format does not keep.
    Raises CheckpointError as `check`.
    """
    check(source)
    tensors = _huggingface_tensors(source)
    kinds = {tensor.dtype for tensor in tensors.values()}
    kind = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)  # the dtype in which transformers computes
    config = _config(source, kind)
    lost = huggingface_write.lost(source, config)
    with staged(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(temporary / WEIGHTS, tensors, dtype=dtype)
    _warn(kind, lost)


def _warn(kind: torch.dtype, lost: list[str]) -> None:
    if lost:
        log.warning("the Hugging Face format does not keep every setting; read again, %s", ", ".join(lost))
    log.warning("transformers does not mask documents, so its results differ after an EOS within a text (%s)", SPEC)
    if kind in (torch.bfloat16, torch.float16):
        log.warning(
            "transformers computes in the half precision of these weights unless from_pretrained gets dtype=float32 "
            "(%s)", SPEC,
        )  # fmt: skip


def _config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    assert source.blt_config is not None
    assert source.patch_rule is not None
    name = str(dtype).removeprefix("torch.")
    return huggingface_write.to_json(source.blt_config, source.entropy_config, source.patch_rule, name)


def _huggingface_tensors(source: Source) -> dict[str, StoredTensor]:
    """All weights under their Hugging Face names, in our order."""
    assert source.blt is not None
    blt, config = source.blt, source.blt.config
    tensors = {huggingface_name(ours): _written(ours, t, config) for ours, t in blt.weights.items()}
    if config.hash is None:  # transformers expects a table, which has no rows
        example = next(iter(blt.weights.values()))
        tensors[HASH_TENSOR] = StoredTensor((HASH_TENSOR,), (torch.empty(0, config.local_dim, dtype=example.dtype),))
    if source.entropy is not None:
        tensors |= {huggingface_name(ours): t for ours, t in source.entropy.weights.items()}
    return tensors


def _written(ours: str, tensor: StoredTensor, config: BLTConfig) -> StoredTensor:
    stack = {"encoder": config.encoder, "decoder": config.decoder}.get(ours.split(".")[0])
    grouped = re.search(r"\.attention\.w[kv]\.", ours)
    return _repeat_heads(tensor, stack) if stack is not None and grouped else tensor

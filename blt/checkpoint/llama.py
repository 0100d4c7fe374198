"""Llama checkpoints to start the latent transformer from (paper, section 6.2): a Hugging Face folder or a GGUF file.

Only the blocks are read: embeddings, the final norm and the output have no use between patches. Two layouts of the
rotary embedding occur. transformers rotates the halves of a head, (x[i], x[i + K/2]); this project rotates neighbours,
(x[2i], x[2i + 1]), and so does llama.cpp, whose GGUF files already have the rows of queries and keys in that order.
Reordering the rows changes no attention score, because queries and keys get the same permutation of the head.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from blt.checkpoint import hub
from blt.checkpoint.claims import MOST_TENSORS
from blt.checkpoint.gguf_file import GGUFFile
from blt.checkpoint.huggingface import CONFIG, LAYER, UNUSED, weight_files
from blt.checkpoint.source import parse, read_json
from blt.checkpoint.tensors import read_safetensors
from blt.model.config import TransformerConfig
from blt.model.layers import Stack
from blt.model.shards import local_rows
from blt_runtime import reading
from blt_runtime.errors import CheckpointError, MissingExtra, shown

log = logging.getLogger(__name__)
LONGEST = 1 << 20  # rows of a rotary table
GGUF_FREQUENCIES = "rope_freqs.weight"  # factors of the rotary frequencies (Llama 3.1), in no field of the file
SHAPES = ("dim", "n_layers", "n_heads", "kv_heads", "head_size", "hidden_dim")
FUNCTION = ("norm_eps", "rope_theta")
Weight = TypeVar("Weight")


@dataclass(frozen=True)
class BlockNames:
    """A format's names of the weights of a block, `prefix.<layer>.<name>.weight`, and those that it never reads."""

    prefix: str
    names: Mapping[str, str]
    unused: re.Pattern[str]

    def weight(self, layer: int | str, name: str) -> str:
        return f"{self.prefix}.{layer}.{self.names[name]}.weight"

    def find(self, ours: str, found: Mapping[str, Weight], where: Path) -> tuple[str, Weight]:
        """The format's name of one of our parameters, and what is stored under it. Raises CheckpointError."""
        _, layer, name = ours.removesuffix(".weight").split(".", 2)
        theirs = self.weight(layer, name)
        if theirs not in found:
            raise CheckpointError(f"{where}: missing {theirs}; copy the whole checkpoint again")
        return theirs, found[theirs]

    def check_plain(self, found: Iterable[str], n_layers: int, where: Path) -> None:
        """Raises CheckpointError if a block has more than a plain Llama's weights: nothing is dropped silently."""
        if n_layers > MOST_TENSORS:
            raise CheckpointError(f"{where}: the configuration has {n_layers:,} layers, the file fewer; copy it again")
        known = {self.weight(layer, name) for layer in range(n_layers) for name in self.names}
        blocks = {name for name in found if name.startswith(f"{self.prefix}.") and not self.unused.match(name)}
        rest = sorted(blocks - known)
        if rest:
            listed = ", ".join(rest[:3]) + (", ..." if len(rest) > 3 else "")
            raise CheckpointError(f"{where}: {listed} ({len(rest)} in all) are not supported; use a plain Llama")


FOLDER_NAMES = BlockNames("model.layers", dict(LAYER), UNUSED)
GGUF_NAMES = BlockNames(
    "blk",
    {
        "attention_norm": "attn_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
    re.compile(r".*\.attn_rot_embd\..*"),
)


@dataclass(frozen=True)
class Llama:
    """The blocks of a Llama. `read` returns one weight by its name in a `Stack` (`layers.0.attention.wq.weight`), in
    float32 and in this project's layout."""

    path: Path
    config: TransformerConfig
    read: Callable[[str], Tensor]

    @torch.no_grad()
    def copy_to(self, stack: Stack) -> None:
        """Copies the weights, or this rank's rows of them, into the blocks of `stack`, one weight in memory at a time.

        Raises CheckpointError for another shape, and for weights that are missing or not finite. Another `norm_eps` or
        `rope_theta` is a warning: the blocks then compute something slightly different from what was trained.
        """
        check_fits(self.config, stack.config, self.path)
        for name, parameter in stack.layers.named_parameters(prefix="layers"):
            weight = self.read(name)
            if weight.shape != parameter.shape:
                shapes = f"{tuple(weight.shape)}, expected {tuple(parameter.shape)}"
                raise CheckpointError(f"{self.path}: {name} is {shapes}; the file does not fit its configuration")
            if not weight.isfinite().all():
                raise CheckpointError(f"{self.path}: NaN or infinite weights in {name}; it was saved broken")
            rows, first = local_rows(parameter)
            rows.copy_(weight[first : first + len(rows)])


def check_fits(theirs: TransformerConfig, ours: TransformerConfig, path: Path) -> None:
    """Raises CheckpointError that lists the values of `model.latent` that these weights need."""
    wrong = [name for name in SHAPES if getattr(theirs, name) != getattr(ours, name)]
    if wrong:
        listed = ", ".join(f"{name} {getattr(theirs, name)} (not {getattr(ours, name)})" for name in wrong)
        raise CheckpointError(f"{path} does not fit model.latent: it has {listed}; leave these keys out")
    for name in FUNCTION:
        if getattr(theirs, name) != getattr(ours, name):
            log.warning(
                "%s was trained with %s %g, model.latent has %g", path, name, getattr(theirs, name), getattr(ours, name)
            )


def read(path: str | Path) -> Llama:
    """Opens a Llama in a Hugging Face folder (or hub name) or a GGUF file; its weights stay there until they are read.

    Raises CheckpointError, also for blocks with more than a plain Llama's weights (biases, experts), and MissingExtra
    for GGUF without the library `gguf`.
    """
    place = hub.resolve(path)
    if place.is_file():
        return _read_gguf(place)
    if not (place / CONFIG).is_file():
        raise CheckpointError(f"{path} is not a Llama: give a folder with {CONFIG} and safetensors, or a .gguf file")
    return _read_folder(place)


def to_pairs(weight_RD: Tensor, head_size: int) -> Tensor:
    """Reorders the rows of a query or key projection [heads * K, D] from halves of each head to neighbouring pairs."""
    halves_HXKD = weight_RD.unflatten(0, (-1, 2, head_size // 2))
    pairs_RD: Tensor = halves_HXKD.transpose(1, 2).flatten(0, 2)
    return pairs_RD


# --- Hugging Face ------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Llama:
    values = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise CheckpointError(f"{where}: model_type is {shown(kind)}; the latent transformer starts from 'llama' only")
    config = _folder_config(values, where)
    found = read_safetensors(*weight_files(folder))
    FOLDER_NAMES.check_plain(found, config.n_layers, folder)

    def tensor(ours: str) -> Tensor:
        _, stored = FOLDER_NAMES.find(ours, found, folder)
        weight = torch.empty(stored.shape)
        stored.copy_to(weight)
        rotated = ours.endswith(("attention.wq.weight", "attention.wk.weight"))
        return to_pairs(weight, config.head_size) if rotated and weight.shape[0] % config.head_size == 0 else weight

    return Llama(folder, config, tensor)


def _folder_config(values: dict[str, Any], where: str) -> TransformerConfig:
    biased = [key for key in ("attention_bias", "mlp_bias") if values.get(key)]
    if biased or values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: {', '.join(biased) or 'hidden_act'} is not supported; use a plain Llama")
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else "default"
    _warn_scaling(kind, where)
    theta = values.get("rope_theta") or (rope.get("rope_theta") if isinstance(rope, Mapping) else None)
    return _config(
        {
            "dim": values.get("hidden_size"),
            "n_layers": values.get("num_hidden_layers"),
            "n_heads": values.get("num_attention_heads"),
            "n_kv_heads": values.get("num_key_value_heads"),
            "head_dim": values.get("head_dim"),
            "ffn_dim": values.get("intermediate_size"),
            "norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_theta": theta or 10000.0,
            "max_seqlen": values.get("max_position_embeddings", 2048),
        },
        where,
    )


# --- GGUF --------------------------------------------------------------------------------------------------------


def _read_gguf(path: Path) -> Llama:
    file, gguf = _open_gguf(path)
    kind = file.fields.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"{path}: architecture is {shown(kind)}; the latent transformer starts from 'llama' only")
    config = _gguf_config(file.fields, str(path))
    GGUF_NAMES.check_plain(file.tensors, config.n_layers, path)
    if GGUF_FREQUENCIES in file.tensors:
        _warn_scaling(GGUF_FREQUENCIES, str(path))

    def tensor(ours: str) -> Tensor:
        theirs, stored = GGUF_NAMES.find(ours, file.tensors, path)
        try:
            return torch.from_numpy(file.read(stored, gguf))
        except (NotImplementedError, ValueError, LookupError) as error:
            raise CheckpointError(f"{path}: {theirs} cannot be dequantised ({error}); use another GGUF") from None

    return Llama(path, config, tensor)


def _open_gguf(path: Path) -> tuple[GGUFFile, Any]:
    try:
        import gguf
    except ImportError:
        raise MissingExtra(f"{path} cannot be read: gguf", "gguf") from None
    try:
        return GGUFFile(path, {int(kind): block for kind, block in gguf.GGML_QUANT_SIZES.items()}), gguf
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a GGUF file ({reading.reason(error)}); copy it again"
        ) from None


def _gguf_config(fields: Mapping[str, Any], where: str) -> TransformerConfig:
    _warn_scaling(fields.get("llama.rope.scaling.type") or "none", where)
    return _config(
        {
            "dim": fields.get("llama.embedding_length"),
            "n_layers": fields.get("llama.block_count"),
            "n_heads": fields.get("llama.attention.head_count"),
            "n_kv_heads": fields.get("llama.attention.head_count_kv"),
            "head_dim": fields.get("llama.attention.key_length"),
            "ffn_dim": fields.get("llama.feed_forward_length"),
            "norm_eps": fields.get("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": fields.get("llama.rope.freq_base") or 10000.0,
            "max_seqlen": fields.get("llama.context_length") or 2048,
        },
        where,
    )


# --- both --------------------------------------------------------------------------------------------------------


def _config(values: dict[str, Any], where: str) -> TransformerConfig:
    if isinstance(values["max_seqlen"], int):
        values["max_seqlen"] = min(values["max_seqlen"], LONGEST)
    if isinstance(values["norm_eps"], float):  # GGUF stores it in float32
        values["norm_eps"] = float(f"{values['norm_eps']:.6g}")
    return parse(TransformerConfig, values, where)


def _warn_scaling(kind: str, where: str) -> None:
    if kind not in ("default", "none"):
        log.warning(
            "%s: the scaling %s of the rotary frequencies is ignored; the plain ones of rope_theta are used",
            where,
            shown(kind),
        )

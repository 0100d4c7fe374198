"""Tiny random models that together use every option of the architecture, and a text that is hard on caches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from blt.checkpoint.models import Checkpoint
from blt.generate import reference
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel, HashConfig, TransformerConfig
from blt_runtime.backends.onnx import ROWS_MINIMUM, load_library
from blt_runtime.errors import BackendError
from blt_runtime.ids import BOS, EOS, encode
from blt_runtime.patching import PatchRule

WINDOW = 24


def runs_rows() -> bool:
    """Whether the installed onnxruntime runs the batched graphs."""
    try:
        load_library(ROWS_MINIMUM)
    except BackendError:
        return False
    return True


def stack(dim: int, layers: int, heads: int, **more: object) -> TransformerConfig:
    values = {"dim": dim, "n_layers": layers, "n_heads": heads, "ffn_dim": 2 * dim, "max_seqlen": 640} | more
    return TransformerConfig.model_validate(values)


ENTROPY = EntropyConfig(dim=32, n_layers=2, n_heads=2, ffn_dim=48, window=WINDOW, max_seqlen=640)
PLAIN = BLTConfig(
    encoder=stack(32, 1, 2, window=WINDOW),
    latent=stack(64, 2, 4),
    decoder=stack(32, 2, 2, window=WINDOW),
    hash=HashConfig(sizes=(3, 4, 5), rows=97),
)
BY_ENTROPY = PatchRule("entropy", threshold=0.0)  # the threshold is set to the text's median below

VARIANTS: dict[str, tuple[BLTConfig, PatchRule]] = {
    "plain": (PLAIN, BY_ENTROPY),
    "all_layers_gqa_projection": (
        PLAIN.model_copy(
            update={
                "encoder": stack(32, 2, 4, n_kv_heads=2, window=WINDOW),
                "latent": stack(48, 2, 4, n_kv_heads=1),
                "decoder": stack(32, 2, 4, n_kv_heads=2, window=WINDOW),
                "cross_k": 3,
                "encoder_cross_all_layers": True,
                "decoder_cross_all_layers": False,
                "hash": HashConfig(sizes=(1, 2, 8), rows=1009, functions=3),
            }
        ),
        replace(BY_ENTROPY, monotonic=True),
    ),
    "cross_windows_own_heads_newlines": (
        PLAIN.model_copy(
            update={
                "encoder": stack(32, 2, 2, window=WINDOW),
                "encoder_cross_window": 2,
                "decoder_cross_window": 3,
                "encoder_cross_heads": 4,
                "decoder_cross_heads": 1,
                "encoder_cross_all_layers": True,
                "pooling": "mean",
            }
        ),
        replace(BY_ENTROPY, reset_newlines=True, threshold_add=0.0),
    ),
    "no_hash_space_causal_latent": (
        PLAIN.model_copy(update={"hash": None, "latent_document_mask": False, "pooling": "min"}),
        PatchRule("space"),
    ),
    "max_patch_length": (PLAIN, replace(BY_ENTROPY, max_patch_length=3)),
    "hash_entropy": (PLAIN, BY_ENTROPY),
    "hash_entropy_without_layers": (PLAIN, replace(BY_ENTROPY, reset_newlines=True)),
    "static": (PLAIN.model_copy(update={"pooling": "learned"}), PatchRule("static", patch_size=5)),
    "bytes_no_window": (
        PLAIN.model_copy(update={"encoder": stack(32, 1, 2), "decoder": stack(32, 2, 2), "cross_k": 1}),
        PatchRule("byte"),
    ),
}


ENTROPY_OF = {
    "hash_entropy": ENTROPY.model_copy(update={"n_layers": 1, "hash": HashConfig(sizes=(3, 4, 5), rows=53)}),
    "hash_entropy_without_layers": ENTROPY.model_copy(
        update={"dim": 24, "n_layers": 0, "hash": HashConfig(sizes=(2, 7), rows=101, functions=2)}
    ),
}
"""Entropy models of variants that have another one than ENTROPY: with the n-grams of the encoder in tables of other
rows, and with others and no layer."""


def hard_text() -> np.ndarray:
    """More ids than the window, with EOS (also twice in a row), newlines, multi-byte text, all raw bytes, and long runs
    without a boundary."""
    parts = [
        encode("Grüße aus 東京 🚀\nline two\n\nline four ", bos=True, eos=True),
        encode(b"x" * 40 + b"\xff\xfe\x80", bos=True, eos=True),
        [EOS],
        encode(bytes(range(256)), bos=False),
        encode("def f(x):\n    return x + 1\n", bos=True),
    ]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def tiny(variant: str = "plain", seed: int = 0) -> Checkpoint:
    """A random checkpoint of one of VARIANTS."""
    return random_checkpoint(*VARIANTS[variant], seed, entropy_config=ENTROPY_OF.get(variant, ENTROPY))


def random_checkpoint(
    config: BLTConfig, rule: PatchRule, seed: int = 0, entropy_config: EntropyConfig = ENTROPY
) -> Checkpoint:
    """Random weights, with the rule's threshold in the widest gap near the median entropy of the text."""
    generator = torch.Generator().manual_seed(seed)
    blt, entropy = BLT(config), EntropyModel(entropy_config)
    for model in (blt, entropy):
        model.init_weights(generator)
    with torch.no_grad():
        entropy.output.weight.mul_(3)  # sharper predictions, so that entropies spread over a nat or more
    if rule.needs_entropy:
        rule = replace(rule, threshold=_threshold(entropy, rule))
    return Checkpoint(blt.eval(), entropy.eval() if rule.needs_entropy else None, rule)


def _threshold(entropy: EntropyModel, rule: PatchRule) -> float:
    with torch.no_grad():
        values = reference.entropies(entropy, hard_text().tolist(), rule.reset_newlines)[0].numpy()
    ordered = np.sort(np.diff(values) if rule.monotonic else values)
    middle = ordered[len(ordered) // 2 : len(ordered) * 3 // 4]
    widest = int(np.diff(middle).argmax())
    return float(middle[widest] + middle[widest + 1]) / 2


def prompts() -> list[list[int]]:
    """Prompts of different kinds: one id, prose, bytes that are not UTF-8."""
    return [[BOS], encode("Once upon a time", bos=True).tolist(), encode(b"\x80\xff\n\x00", bos=True).tolist()]

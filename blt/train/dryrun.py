"""What a configuration costs, without allocating it: parameters, FLOPs, memory.

One formula per model gives the FLOPs (`flops` or `flops_per_byte` of its configuration, see `blt.model.config`), and
every report uses these functions. Matrix products are counted, and attention over the keys that a position may see;
norms, softmax, rotation and table lookups are not. A training step costs three forward passes: each product has two
gradients.
"""

from __future__ import annotations

from typing import Any

from blt.model import EntropyConfig, TransformerConfig
from blt.train.config import BLTRun, BPERun, EntropyRun, RunConfig

OPTIMIZER_BYTES = 16
"""Per parameter in float32: weight, gradient and AdamW's two moments."""
HEAD_OUTPUTS = 8
"""Activations kept per position and layer for the backward pass, in widths: two norms, q, k, v, attention output, its
projection and the block's output. The feed-forward part adds three of its hidden width."""
FORWARD_PASSES_PER_STEP = 3
"""FLOPs of a training step in forward passes."""
BYTES_PER_TOKEN = 4.0
"""Of a BPE vocabulary on English text, used if it was not measured on the data; `blt train bpe` measures it."""


def flops_by_part(
    config: RunConfig,
    *,
    bytes_per_token: float | None = None,
    entropy: EntropyConfig | None = None,
    patch_size: float | None = None,
) -> dict[str, float]:
    """Forward FLOPs per byte of each part, in rows of the largest bucket.

    bytes_per_token: of a BPE vocabulary on the data.  entropy: the entropy model that cuts the patches of a BLT; it
    reads every byte, too.  patch_size: mean bytes per patch on the data (default: the configuration's target).
    """
    context = config.batch.byte_buckets[-1]
    if isinstance(config, EntropyRun):
        return {"entropy model": config.model.flops_per_byte(context)}
    if isinstance(config, BPERun):
        return {"token model": config.model.flops_per_byte(context, bytes_per_token or BYTES_PER_TOKEN)}
    parts = config.model.flops(patch_size or config.patching.mean_patch_size, context)
    if entropy is not None and config.patching.scheme == "entropy":
        parts = {"entropy model": entropy.flops_per_byte(context), **parts}
    return parts


def flops_per_byte(config: RunConfig, **measured: Any) -> float:
    """Forward FLOPs per byte; arguments as `flops_by_part`."""
    return sum(flops_by_part(config, **measured).values())


def dry_run(config: RunConfig, **measured: Any) -> dict[str, Any]:
    """Parameters (also by part), forward FLOPs per byte, and a memory estimate in bytes of one training step.

    FLOPs are those of the configured row; the other arguments as `flops_by_part`.
    """
    tokens = config.batch.rows * config.batch.byte_buckets[-1]
    flops = flops_by_part(config, **measured)
    if isinstance(config, BLTRun):
        parts = config.model.params()
        stacks: list[tuple[TransformerConfig, int]] = [(config.model.encoder, tokens), (config.model.decoder, tokens)]
        stacks.append((config.model.latent, config.batch.rows * (config.batch.patches or 1)))
    else:
        parts = {next(iter(flops)): config.model.n_params()}
        stacks = [(config.model, tokens)]
    bytes_per_position = measured.get("bytes_per_token") or BYTES_PER_TOKEN if isinstance(config, BPERun) else 1.0
    n_params = sum(parts.values())
    item = 2 if config.run.dtype == "bf16" else 4
    activations = sum(
        item * n * stack.n_layers * (HEAD_OUTPUTS * stack.dim + 3 * stack.hidden_dim) for stack, n in stacks
    )
    activations += 3 * 4 * tokens * config.model.vocab_size
    return {
        "parameters": n_params,
        "parameters_by_part": parts,
        "flops_per_byte": sum(flops.values()),
        "flops_per_byte_by_part": flops,
        "bytes_per_step": round(tokens * bytes_per_position),
        "memory_bytes": {
            "weights_and_optimizer": OPTIMIZER_BYTES * n_params,
            "activations": activations,
            "total": OPTIMIZER_BYTES * n_params + activations,
        },
    }

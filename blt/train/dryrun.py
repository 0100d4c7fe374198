"""What a configuration costs, without allocating it."""

from __future__ import annotations

from typing import Any

from blt.config import EntropyRun, RunConfig
from blt.model import TransformerConfig

OPTIMIZER_BYTES = 16
"""Per parameter in float32: weight, gradient and AdamW's two moments."""
HEAD_OUTPUTS = 8
"""Activations kept per position and layer for the backward pass, in widths: two norms, q, k, v, attention output, its
projection and the block's output; the feed-forward part adds three of its hidden width."""


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Parameters (per part), forward FLOPs per byte, and a memory estimate in bytes of one training step.

    FLOPs and patches are those of the configured row and mean patch size.
    """
    context = config.batch.byte_buckets[-1]
    tokens = config.batch.rows * context
    if isinstance(config, EntropyRun):
        parts = {"entropy model": config.model.n_params()}
        flops = {"entropy model": config.model.flops_per_byte(context)}
        stacks: list[tuple[TransformerConfig, int]] = [(config.model, tokens)]
    else:
        patches, patch = config.batch.patches or 1, config.patching.mean_patch_size
        parts = config.model.params()
        flops = config.model.flops(patch, context)
        stacks = [(part, tokens) for part in (config.model.encoder, config.model.decoder)]
        stacks.append((config.model.latent, config.batch.rows * patches))
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
        "bytes_per_step": tokens,
        "memory_bytes": {
            "weights_and_optimizer": OPTIMIZER_BYTES * n_params,
            "activations": activations,
            "total": OPTIMIZER_BYTES * n_params + activations,
        },
    }

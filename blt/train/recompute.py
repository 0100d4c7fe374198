"""Activation checkpointing: a block keeps only its input, and its forward pass is recomputed in the backward pass.

It costs one more forward pass of the blocks, and saves the activations that `blt train --dry-run` counts, except one
width per position and layer.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from blt.model.layers import Block


def recompute_blocks(model: nn.Module) -> int:
    """Recomputes every block of every stage in the backward pass from now on; returns how many blocks there are.

    The gradients are bit-identical, because nothing in a block is random.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        recomputed = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.__dict__["forward"] = recomputed
    return len(blocks)


def undo_recompute(model: nn.Module) -> None:
    """Undoes `recompute_blocks`, and the compilation of single blocks."""
    for module in model.modules():
        if isinstance(module, Block):
            module.__dict__.pop("forward", None)

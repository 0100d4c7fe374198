"""Activation checkpointing: a block keeps its input alone and computes itself again in the backward pass.

It saves what `blt train --dry-run` counts as activations, all but one width a position and layer, for one more forward
pass of the blocks.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from blt.model.layers import Block


def recompute_blocks(model: nn.Module) -> int:
    """Every block of every stage computes itself twice from now on; returns how many. The gradients are the same bits:
    nothing in a block is random."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.__dict__["forward"] = again
    return len(blocks)


def compute_once(model: nn.Module) -> None:
    """Undoes `recompute_blocks`, and the compilation of single blocks."""
    for module in model.modules():
        if isinstance(module, Block):
            module.__dict__.pop("forward", None)

"""Activation checkpointing: parts of the model keep only their inputs and are computed again in the backward pass.

The parts are the blocks of every stage, the pooling of patches (gathers of byte states, their keys and values, and the
encoder's cross-attention), the patches' keys and values for the decoder, and each of its cross-attentions with its
gather. It costs one more forward pass of them, or without their matrix products and attention, if these are kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from blt.model import BLT
from blt.model.blt import LocalDecoder
from blt.model.layers import Block

PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (Block, "forward"), (BLT, "pool"), (LocalDecoder, "patch_keys_values"), (LocalDecoder, "read_patches"),
)  # fmt: skip
"""The methods that are computed again, and with several ranks compiled, by class."""


EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""Operations whose results selective recomputation keeps: products with weights, and attention."""


def recompute_parts(model: nn.Module, *, selective: bool = False) -> int:
    """Computes the parts of every stage again in the backward pass from now on; returns how many parts there are.

    selective: all but the `EXPENSIVE` operations. The gradients are bit-identical, because nothing in a part is random.
    """
    found = parts(model)
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    for module, name in found:
        again = partial(checkpoint, getattr(module, name), use_reentrant=False, preserve_rng_state=False, **options)
        module.__dict__[name] = again
    return len(found)


def undo_recompute(model: nn.Module) -> None:
    """Undoes `recompute_parts`, and the compilation of single parts."""
    for module, name in parts(model):
        module.__dict__.pop(name, None)


def parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules and names of the methods in `PARTS`."""
    return [(module, name) for module in model.modules() for kind, name in PARTS if isinstance(module, kind)]

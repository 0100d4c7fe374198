"""Activation checkpointing: parts of the model keep only their inputs and are computed again in the backward pass.

The parts are the blocks of every stage, the pooling of patches (gathers of byte states, their keys and values, and the
encoder's cross-attention), the patches' keys and values for the decoder, and each of its cross-attentions with its
gather. It costs one more forward pass of them.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from blt.model import BLT
from blt.model.blt import LocalDecoder
from blt.model.layers import Block

PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (Block, "forward"), (BLT, "pool"), (LocalDecoder, "patch_keys_values"), (LocalDecoder, "read_patches"),
)  # fmt: skip
"""The methods that are computed again, and with several ranks compiled, by class."""


def recompute_parts(model: nn.Module) -> int:
    """Computes the parts of every stage again in the backward pass from now on; returns how many parts there are.

    The gradients are bit-identical, because nothing in a part is random.
    """
    found = parts(model)
    for module, name in found:
        again = partial(checkpoint, getattr(module, name), use_reentrant=False, preserve_rng_state=False)
        module.__dict__[name] = again
    return len(found)


def undo_recompute(model: nn.Module) -> None:
    """Undoes `recompute_parts`, and the compilation of single parts."""
    for module, name in parts(model):
        module.__dict__.pop(name, None)


def parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules and names of the methods in `PARTS`."""
    return [(module, name) for module in model.modules() for kind, name in PARTS if isinstance(module, kind)]

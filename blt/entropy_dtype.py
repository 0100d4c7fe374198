"""The switch between float32 entropies, which are ours, and the reference loader's bfloat16 ones (spec section 4)."""

from __future__ import annotations

from dataclasses import replace

from blt.checkpoint import Checkpoint
from blt.model.bfloat16 import BFloat16EntropyModel, to_bfloat16
from blt_runtime.errors import RuleError
from blt_runtime.patching import EntropyDtype


def with_entropy_dtype(checkpoint: Checkpoint, dtype: EntropyDtype) -> Checkpoint:
    """The checkpoint with its entropy model and its patch rule in `dtype`; the BLT is the same object.

    An entropy model alone (no rule) is converted, too.  Raises RuleError if bfloat16 is asked of a checkpoint whose
    patches need no entropies, or float32 of one that was rounded already.
    """
    model, rule = checkpoint.entropy, checkpoint.patch_rule
    rounded = isinstance(model, BFloat16EntropyModel)
    if dtype == "float32" and rounded:
        raise RuleError("the entropy model was rounded to bfloat16: load the checkpoint again for float32 entropies")
    if dtype == "bfloat16" and model is None:
        raise RuleError("bfloat16 entropies need an entropy model, and this checkpoint has none: leave float32")
    if rule is not None:
        rule = replace(rule, entropy_dtype=dtype)
    if dtype == "bfloat16" and model is not None and not rounded:
        model = to_bfloat16(model)
    return replace(checkpoint, entropy=model, patch_rule=rule)

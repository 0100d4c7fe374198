"""Evaluation on text: what a bundle's precision costs in bits per byte, and which patch boundaries it moves.

PyTorch in float32 and the written graphs on ONNX Runtime score the same ids, each with the boundaries of its entropy
model. Boundaries depend only on the entropy model.

Letters: N ids, V vocabulary, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from blt.checkpoint.models import Checkpoint
from blt.generate.torch_backend import open_model
from blt_runtime import Model, Score
from blt_runtime.bundle.manifest import Judged
from blt_runtime.errors import UsageError
from blt_runtime.ids import OFFSET

Ids = npt.NDArray[np.int64]


@dataclass
class _Tally:
    bits: float = 0.0
    n_bytes: int = 0
    boundaries: set[tuple[int, int]] = field(default_factory=set)

    def add(self, piece: int, score: Score) -> None:
        logits_NV, next_N = torch.from_numpy(score.logits[:-1]).double(), torch.from_numpy(score.ids[1:])
        self.bits += torch.nn.functional.cross_entropy(logits_NV, next_N, reduction="sum").item() / math.log(2)
        self.n_bytes += int((score.ids >= OFFSET).sum())
        self.boundaries |= {(piece, int(start)) for start in np.cumsum(score.patch_lengths[:-1])}


def evaluate(checkpoint: Checkpoint, model: Model, pieces: Sequence[Ids]) -> Judged:
    """Score `pieces`, id sequences [N] of BOS and bytes, with PyTorch and with the bundle's model.

    Raises UsageError for pieces without bytes, or of more ids than the bundle's capacity.
    """
    spec = model.spec
    longest = max((len(ids) for ids in pieces), default=0)
    if longest > spec.capacity_bytes:
        raise UsageError(f"a piece of {longest} ids is longer than the capacity {spec.capacity_bytes} of the bundle")
    floats = open_model(checkpoint, capacity=spec.capacity_bytes, patches=spec.capacity_patches, chunk=spec.chunk)
    want = _tally(floats, pieces)
    got = _tally(model, pieces)
    if not want.n_bytes:
        raise UsageError("the text to evaluate on holds no bytes")
    return Judged(
        bytes=want.n_bytes,
        float_bits_per_byte=want.bits / want.n_bytes,
        bits_per_byte=got.bits / got.n_bytes,
        boundaries=len(want.boundaries),
        boundaries_lost=len(want.boundaries - got.boundaries),
        boundaries_new=len(got.boundaries - want.boundaries),
    )


def _tally(model: Model, pieces: Sequence[Ids]) -> _Tally:
    tally, stream = _Tally(), model.stream(bos=False)
    for piece, ids_N in enumerate(pieces):
        tally.add(piece, stream.score_ids(ids_N))
    return tally

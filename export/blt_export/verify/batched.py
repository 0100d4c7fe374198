"""The graphs for many streams against those of single streams, which were compared with PyTorch before: the same
tokens, three rows in each other's company, in slices and byte by byte.

The entropies of both forms differ by roundings, so rows cut their texts by a rule without entropies here; what the
entropy model gives is compared by itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxBackend, OnnxRowBackend
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import Parity
from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.engine.batch import Batch, Row
from blt_runtime.ids import BOS, EOS, OFFSET
from blt_runtime.patching import PatchRule

from .parity import TOLERANCE, demand

ROWS, TOKENS, PROMPT, PATCH = 3, 45, 26, 4
Array = npt.NDArray[np.float32]


def check(bundle: Bundle) -> tuple[Parity, ...]:
    """Rows of the parity table: logits of the decoder and entropies, relative to the largest. Raises CheckFailed.

    Quantised graphs round activations to 8 bits, which turns a last bit into a step now and then: their own tolerance.

    Weights stay mapped where they may: a packed copy of them would not fit beside PyTorch's.
    """
    spec = replace(bundle.manifest.spec, patch_rule=PatchRule("static", patch_size=PATCH))
    tokens = max(1, min(TOKENS, spec.capacity_bytes, PATCH * (spec.capacity_patches - 1)))
    text = np.random.default_rng(0).integers(OFFSET, spec.vocab_size, (ROWS, tokens))
    text[:, 0], text[:, tokens // 3] = BOS, EOS
    single = Model(spec, OnnxBackend(bundle, prepack=False), bundle.hash_tables())
    want = [single.score(ids) for ids in text]
    del single
    logits, entropies = _rows(spec, bundle, text)
    pairs = {"batched.logits": (logits, np.array([score.logits[min(PROMPT, tokens) - 1 :] for score in want]))}
    if entropies is not None:
        pairs["batched.entropy"] = (entropies, np.array([score.entropies for score in want]))
    of = bundle.manifest.precision_of
    tolerances = {
        "batched.logits": max(TOLERANCE[of(name)] for name in spec.graphs if name != "entropy"),
        "batched.entropy": TOLERANCE[of("entropy")],
    }
    found = tuple(
        Parity(
            name,
            float(np.abs(got - as_).max() / max(1.0, np.abs(as_).max())),
            tolerances[name],
            as_.shape[0] * as_.shape[1],
        )
        for name, (got, as_) in pairs.items()
    )
    demand(found, "single streams")
    return found


def _rows(spec: ModelSpec, bundle: Bundle, text: npt.NDArray[np.int64]) -> tuple[Array, Array | None]:
    """Logits [ROWS, tokens behind the prompt, V], and entropies [ROWS, tokens] if there is an entropy model."""
    backend = OnnxRowBackend(bundle, prepack=False)
    batch = Batch(spec, backend, bundle.hash_tables(), ROWS, with_entropy="entropy" in spec.graphs)
    rows: list[Row] = [row for row in (batch.open() for _ in text) if row is not None]
    prompt, tokens = min(PROMPT, text.shape[1]), text.shape[1]
    logits: list[list[Array]] = [[] for _ in rows]
    for row, ids in zip(rows, text, strict=True):
        row.feed(ids[:prompt])
    while any(len(of) <= tokens - prompt for of in logits):
        for row in batch.round():
            logits[row.index].append(row.logits_V.copy())
            row.feed(text[row.index, row.placed : row.placed + 1])
    entropies = np.array([row.memory.entropies.array[0, :tokens] for row in rows])
    return np.array(logits), entropies if "entropy" in spec.graphs else None

"""Parity of the batched graphs with the graphs of single streams, which `parity` has compared with PyTorch.

Both read the same tokens: three batched rows, a prompt in slices and then byte by byte. The entropies of both forms
differ by roundings, so the rows use a patch rule without entropies here; the entropies are compared separately.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from blt_runtime import Model, Score
from blt_runtime.backends.onnx import OnnxBackend, OnnxRowBackend
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import Parity
from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.engine.batch import Batch, Row
from blt_runtime.ids import BOS, EOS, OFFSET
from blt_runtime.patching import PatchRule

from .errors import TOLERANCE
from .parity import demand, following

ROWS, TOKENS, PROMPT, PATCH = 3, 45, 26, 4
RULE = PatchRule("static", patch_size=PATCH)
Array = npt.NDArray[np.float32]


def check(bundle: Bundle) -> tuple[Parity, ...]:
    """Rows of the parity table: logits of the decoder and entropies, relative to the largest. Raises CheckFailed.

    Quantised graphs round activations to 8 bits, which occasionally turns a difference in the last bit into a whole
    step, so they have a larger tolerance. Weights stay mapped where possible: a packed copy and PyTorch's weights would
    not fit.
    """
    spec = replace(bundle.manifest.spec, patch_rule=RULE)
    tokens = max(1, min(TOKENS, spec.capacity_bytes, PATCH * (spec.capacity_patches - 1)))
    text = np.random.default_rng(0).integers(OFFSET, spec.vocab_size, (ROWS, tokens))
    text[:, 0], text[:, tokens // 3] = BOS, EOS
    single = Model(spec, OnnxBackend(bundle, prepack=False), bundle.hash_tables())
    scores = [single.score(ids) for ids in text]
    del single
    logits, entropies = _rows(bundle, text)
    pairs = {"batched.logits": (logits, np.array([score.logits[min(PROMPT, tokens) - 1 :] for score in scores]))}
    if entropies is not None:
        pairs["batched.entropy"] = (entropies, np.array([score.entropies for score in scores]))
    of = bundle.manifest.precision_of
    tolerances = {
        "batched.logits": max(TOLERANCE[of(name)] for name in spec.graphs if name != "entropy"),
        "batched.entropy": TOLERANCE[of("entropy")],
    }
    found = tuple(
        Parity(name, _error(got, want), tolerances[name], want.shape[0] * want.shape[1], "largest")
        for name, (got, want) in pairs.items()
    )
    noises: dict[str, float] = {}
    if any(not row.error <= row.tolerance for row in found) and bundle.manifest.precision == "fp32":
        noises = _noises(spec, bundle, text, scores)
        found = tuple(following(row, noises[row.output]) for row in found)
    demand(found, "single streams", noises)
    return found


def _error(got: Array, want: Array) -> float:
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def _noises(spec: ModelSpec, bundle: Bundle, text: npt.NDArray[np.int64], scores: list[Score]) -> dict[str, float]:
    """How far the graphs of single streams are from themselves when they read one token per call."""
    by_token = Model(replace(spec, chunk=1), OnnxBackend(bundle, prepack=False), bundle.hash_tables())
    steps = [by_token.score(ids) for ids in text]
    found = {"batched.logits": max(_error(a.logits, b.logits) for a, b in zip(steps, scores, strict=True))}
    if "entropy" in spec.graphs:
        found["batched.entropy"] = max(_error(a.entropies, b.entropies) for a, b in zip(steps, scores, strict=True))
    return found


def _rows(bundle: Bundle, text: npt.NDArray[np.int64]) -> tuple[Array, Array | None]:
    """Logits [ROWS, tokens after the prompt, V], and entropies [ROWS, tokens] if there is an entropy model."""
    backend = OnnxRowBackend(bundle, prepack=False)
    spec = replace(backend.spec, patch_rule=RULE)
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

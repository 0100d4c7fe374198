"""Parity of the batched graphs with the graphs of single streams, which `parity` has compared with PyTorch.

Both read the same tokens: three batched rows, a prompt in slices and then byte by byte (`rows`).
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
from blt_runtime.engine.batch import Batch

from . import rows
from .errors import TOLERANCE
from .parity import demand, following
from .rows import Array

ROWS = 3


def check(bundle: Bundle) -> tuple[Parity, ...]:
    """Rows of the parity table: logits of the decoder and entropies, relative to the largest. Raises CheckFailed.

    Quantised graphs round activations to 8 bits, which occasionally turns a difference in the last bit into a whole
    step, so they have a larger tolerance. Weights stay mapped where possible: a packed copy and PyTorch's weights would
    not fit.
    """
    spec = replace(bundle.manifest.spec, patch_rule=rows.rule())
    text = rows.texts(spec, ROWS)
    single = Model(spec, OnnxBackend(bundle, prepack=False), bundle.hash_tables())
    scores = [single.score(ids) for ids in text]
    del single
    logits, entropies = _rows(bundle, text)
    pairs = {"batched.logits": (logits, np.array([score.logits[rows.first(text.shape[1]) :] for score in scores]))}
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


def _rows(bundle: Bundle, text: npt.NDArray[np.int64]) -> rows.Results:
    backend = OnnxRowBackend(bundle, prepack=False)
    spec = replace(backend.spec, patch_rule=rows.rule())
    return rows.read(Batch(spec, backend, bundle.hash_tables(), ROWS, with_entropy="entropy" in spec.graphs), text)

"""Models and streams on the null backend, for every kind of cache and patch rule, and their reference."""

from __future__ import annotations

import numpy as np

from blt_runtime import Model, PatchRule, Stream
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.bundle.spec import HashSpec, ModelSpec
from blt_runtime.ids import BOS, EOS, NEWLINE
from tests.runtime.null_reference import compute

HASH = HashSpec((3, 5), 2, 11, 3)
SAME_GRAMS, OTHER_GRAMS = HashSpec((3, 5), 2, 17, 2), HashSpec((2, 9), 1, 13, 2)
"""Hash tables of an entropy model beside HASH."""


def tables_for(spec: ModelSpec) -> dict[str, np.ndarray]:
    random, hashes = np.random.default_rng(5), spec.hashes
    shapes = {name: (hash.tables * hash.rows, hash.dim) for name, hash in hashes.items()}
    return {name: random.integers(0, 50, shape).astype(np.float32) for name, shape in shapes.items()}


def model_of(spec: ModelSpec) -> Model:
    return Model(spec, NullBackend(spec), tables_for(spec))


def calls_of(model: Model) -> dict[str, int]:
    """The calls of each graph so far; the dictionary is the backend's own and counts on."""
    backend = model.backend
    assert isinstance(backend, NullBackend)
    return backend.calls


def random_ids(n: int, seed: int = 0) -> np.ndarray:
    """Random bytes in documents and lines of random lengths, after BOS."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 260, n)
    ids[rng.random(n) < 0.05] = EOS
    ids[rng.random(n) < 0.05] = NEWLINE
    ids[:1] = BOS
    return ids


def assert_matches_reference(stream: Stream, ids: np.ndarray) -> None:
    expected = compute(stream.spec, ids, tables_for(stream.spec))
    assert stream.ids.tolist() == ids.tolist()
    assert stream.patch_lengths.tolist() == expected.patch_lengths.tolist()
    np.testing.assert_array_equal(stream.logits, expected.logits[-1].astype(np.float32))


SPECS = {
    "ring": null_spec(),
    "ring, tight": null_spec(window=5, slack=3, chunk=4),
    "window": null_spec(local_kind="window"),
    "window, tight": null_spec(local_kind="window", window=5, slack=0, chunk=16),
    "linear": null_spec(local_kind="linear", slack=600),
    "hash": null_spec(hash=HASH),
    "hash of both": null_spec(hash=HASH, entropy_hash=SAME_GRAMS, local_kind="window"),
    "encoder window": null_spec(encoder_window=3, hash=HASH, entropy_hash=OTHER_GRAMS),
    "decoder window": null_spec(decoder_window=3, local_kind="window"),
    "all windows": null_spec(encoder_window=2, decoder_window=2),
    "newlines": null_spec(PatchRule("entropy", threshold=3.5, reset_newlines=True), local_kind="window"),
    "newlines, ring": null_spec(PatchRule("entropy", threshold=3.5, reset_newlines=True)),
    "monotonic": null_spec(PatchRule("entropy", threshold=0.5, monotonic=True, max_patch_length=5)),
    "long patches": null_spec(PatchRule("entropy", threshold=4.9), chunk=32, slack=32),
    "huge patches": null_spec(PatchRule("static", patch_size=70), encoder_window=2),
    "space": null_spec(PatchRule("space"), entropy=False),
    "static": null_spec(PatchRule("static", patch_size=3), hash=HASH),
    "no latent mask": null_spec(latent_document_mask=False, local_kind="window"),
}

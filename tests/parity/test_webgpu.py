"""Every option of the model on WebGPU: tiny models of a pairwise cover, read and written as on the CPU.

The device is SwiftShader, a Vulkan driver in software, so these tests need no GPU. It compiles a shader for each kernel
that it meets; the models share widths and heads, so that most kernels are compiled once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import Checkpoint
from blt.model import BLTConfig, EntropyConfig, HashConfig
from blt.model.config import TransformerConfig
from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.backends.onnx import DeviceSession, OnnxBackend
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.patching import PatchRule
from tests.pairwise import long_cover
from tests.runtime.device_backend import assert_streams_equal
from tests.tiny import random_checkpoint
from tests.webgpu import require_webgpu

CAPACITY, CHUNK, NEW = 64, 16, 3
PLAIN: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "ffn_dim": 16}
OTHER: dict[str, Any] = {
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 16,
    "ffn_dim": 24,
    "norm_eps": 1e-3,
    "rope_theta": 100.0,
}
LAYERS = {"encoder": 2, "decoder": 2}
"""Of the other stacks: their first and their last layer differ by cross attention."""
WINDOWS: dict[str, dict[str, int]] = {
    "none": {},
    "local": {"encoder": 6, "decoder": 6, "entropy": 6},
    "all": {"encoder": 5, "decoder": 3, "entropy": 4, "latent": 3},
}
SHAPES: dict[str, dict[str, Any]] = {
    "no projections": {"cross_k": 1, "latent_dim": 16, "decoder_projection": False},
    "projection of the decoder": {"cross_k": 2, "latent_dim": 32},
    "both projections": {"cross_k": 3, "latent_dim": 32},
}
HASHES = {"no hash": None, "hash": HashConfig(sizes=(1, 4), rows=89, functions=2)}
ENTROPIES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "hash": {**OTHER, "hash": HashConfig(sizes=(3,), rows=53)},
    "hash, no layers": {**OTHER, "n_layers": 0, "hash": HashConfig(sizes=(3,), rows=53)},
}
RULES: dict[str, list[PatchRule]] = {
    "entropy": [
        PatchRule("entropy", threshold=0.0),
        PatchRule("entropy", threshold=0.0, monotonic=True),
        PatchRule("entropy", threshold=0.0, max_patch_length=3),
    ],
    "newlines": [
        PatchRule("entropy", threshold=0.0, reset_newlines=True),
        PatchRule("entropy", threshold=0.0, reset_newlines=True, threshold_add=0.0),
    ],
    "no entropy": [
        PatchRule("space"),
        PatchRule("static", patch_size=3),
        PatchRule("byte"),
        PatchRule("bpe", max_patch_length=4),
    ],
}
"""Rules by what they need of the entropy model. Cases take the rules of their group one after another: a rule runs on
the host."""

OPTIONS: dict[str, tuple[Any, ...]] = {
    "windows": tuple(WINDOWS),
    "shape": tuple(SHAPES),
    "rules": tuple(RULES),
    "hash": tuple(HASHES),
    "entropy": tuple(ENTROPIES),
    "encoder": ("plain", "other"),
    "latent": ("plain", "other"),
    "decoder": ("plain", "other"),
    "pooling": ("max", "mean", "min", "learned"),
    "encoder_cross_heads": (None, 4),
    "decoder_cross_heads": (None, 1),
    "encoder_cross_all_layers": (False, True),
    "decoder_cross_all_layers": (True, False),
    "encoder_cross_window": (1, 2),
    "decoder_cross_window": (1, 3),
    "latent_document_mask": (True, False),
}
CASES = [dict(zip(OPTIONS, case, strict=True)) for case in long_cover(*OPTIONS.values())]


def checkpoint_of(number: int) -> Checkpoint:
    """The random model of a case."""
    case = CASES[number]
    windows, shape = WINDOWS[case["windows"]], SHAPES[case["shape"]]
    width = {"encoder": 16, "decoder": 16, "latent": shape["latent_dim"]}
    stacks: dict[str, Any] = {
        name: TransformerConfig(dim=dim, max_seqlen=128, window=windows.get(name), **_stack(name, case[name]))
        for name, dim in width.items()
    }
    sizes = {name: value for name, value in shape.items() if name != "latent_dim"}
    plain = {name: case[name] for name in BLTConfig.model_fields if name in case and name not in (*width, "hash")}
    config = BLTConfig(hash=HASHES[case["hash"]], **stacks, **sizes, **plain)
    entropy = EntropyConfig(dim=16, max_seqlen=128, window=windows.get("entropy"), **ENTROPIES[case["entropy"]])
    rules = RULES[case["rules"]]
    earlier = sum(other["rules"] == case["rules"] for other in CASES[:number])
    return random_checkpoint(config, rules[earlier % len(rules)], entropy_config=entropy)


def _stack(name: str, kind: str) -> dict[str, Any]:
    return PLAIN if kind == "plain" else {**OTHER, "n_layers": LAYERS.get(name, 1)}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    require_webgpu(monkeypatch)


def export(number: int, folder: Path, **options: Any) -> Path:
    checkpoint = checkpoint_of(number)
    state = pipeline.prepare(checkpoint, "cuda", capacity=CAPACITY, chunk=CHUNK, check=False, **options)
    return pipeline.run(state, folder / "bundle").path


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case.values())) for case in CASES])
def test_streams_equal_those_of_the_cpu(number: int, tmp_path: Path) -> None:
    """Chunks, steps, a rewind, a snapshot into a second stream, ends of documents. Where no attention has a window, all
    calls of decode steps are captured, probed and replayed."""
    bundle = Bundle.open(export(number, tmp_path))
    captures = CASES[number]["windows"] == "none"
    backend = OnnxBackend(bundle, provider="webgpu", capture=captures)
    model = Model(backend.spec, backend, bundle.hash_tables())
    assert_streams_equal(model, Model.open(bundle.path).stream(bos=False), NEW)
    sessions = [backend.session(name) for name in backend.spec.graphs]
    for session in sessions:
        assert isinstance(session, DeviceSession)
        assert (session.captured > 0) == captures, session.spec.name

"""The flavour cuda: its graphs agree with PyTorch on the CPU, and hold what GPU providers have kernels for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from blt_export import pipeline
from blt_export.rewrite import constant, nodes, op_counts
from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxBackend
from blt_runtime.bundle import graph_file
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import UsageError
from blt_runtime.ids import EOS
from tests.export.variants import VARIANTS, BundleOf
from tests.exports import prepare

VARIANT = VARIANTS[1]
LACKING = {"LogSoftmax", "Or", "Attention", "TensorScatter"}
"""Operators without a kernel in WebGPU."""


def test_every_output_agrees_with_pytorch(bundle_of: BundleOf) -> None:
    manifest = bundle_of(VARIANT, "cuda").manifest
    assert {row.output.split(".")[0] for row in manifest.parity} == {"hash_embedding", "batched", *manifest.spec.graphs}
    for row in manifest.parity:
        assert row.error <= row.tolerance == 2e-5


def test_caches_are_linear_and_as_long_as_the_capacity(bundle_of: BundleOf) -> None:
    spec = bundle_of(VARIANT, "cuda").manifest.spec
    assert not spec.chunk_crosses_documents
    for name, graph in spec.graphs.items():
        assert graph.cache is not None
        assert graph.cache.kind == "linear"
        assert graph.cache.capacity == (spec.capacity_patches if name == "latent" else spec.capacity_bytes)


def test_operators_have_kernels_on_gpus(bundle_of: BundleOf) -> None:
    allowed = graph_file.operators("cuda", quantised=False)
    for path in bundle_of(VARIANT, "cuda").path.glob("*.onnx"):
        graph = ir.load(path).graph
        assert {(node.domain, node.op_type) for node in graph} <= allowed
        assert not LACKING & {node.op_type for node in graph}


def test_attention_has_a_constant_length_and_no_position_ids(bundle_of: BundleOf) -> None:
    report = bundle_of(VARIANT, "cuda")
    for name, spec in report.manifest.spec.graphs.items():
        assert spec.cache is not None
        found = nodes(ir.load(report.path / f"{name}.onnx"), "GroupQueryAttention", "com.microsoft")
        assert len(found) == spec.cache.layers
        for node in found:
            length = constant(node.inputs[6])
            assert length is not None
            assert int(length) == spec.cache.capacity
            assert len(node.inputs) <= 9 or node.inputs[9] is None
            assert "sliding_window_cache" not in node.attributes
            assert ("local_window_size" in node.attributes) == (spec.cache.window is not None)


def test_slices_are_read_by_one_attention_a_layer(tmp_path: Path) -> None:
    report = pipeline.run(prepare("plain", "cuda"), tmp_path / "bundle")
    counts = op_counts(ir.load(report.path / "decoder.onnx"))
    assert counts["com.microsoft.MultiHeadAttention"] == 2


def test_heads_that_the_operator_does_not_take_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the flavour cuda needs heads .* multiple of 8, and latent .* portable"):
        prepare("all_layers_gqa_projection", "cuda")


def test_byte_states_and_patch_vectors_stay_in_memory_of_the_graphs(bundle_of: BundleOf) -> None:
    """Bit for bit the results of the graphs that were compared with PyTorch; no result but entropies and logits."""
    report = bundle_of(VARIANT, "cuda")
    bundle = Bundle.open(report.path)
    resident = OnnxBackend(bundle, resident=True)
    outputs = {t.name for g in resident.spec.graphs.values() for t in g.outputs if t.name not in g.aliases}
    assert outputs == {"entropy", "logits"}
    streams = [
        Model(backend.spec, backend, bundle.hash_tables()).stream() for backend in (OnnxBackend(bundle), resident)
    ]
    text = "Grüße\naus 東京 " * 12
    for stream in streams:
        stream.append(text)
        stream.append_ids([EOS])
        stream.append(text[:40])
    made = [list(stream.generate_ids(20, temperature=0.0, stop_at_eos=False)) for stream in streams]
    assert made[0] == made[1]
    np.testing.assert_array_equal(streams[0].logits, streams[1].logits)

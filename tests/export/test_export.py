"""The whole export: both flavours of one capture agree with PyTorch, and only a successful export leaves a bundle."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest
import torch

import blt_export
from blt.checkpoint import tensors
from blt.checkpoint.models import save
from blt.checkpoint.tensors import StoredTensor
from blt_export import ExportReport, bundle, pipeline
from blt_export.capture import trace
from blt_export.rewrite import op_counts
from blt_runtime.bundle import graph_file
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import BltError, CheckFailed, CheckpointError, UsageError
from blt_runtime.hashing import TableDtype
from tests import exports
from tests.export.small_graphs import dims, has_constant_weight
from tests.export.variants import FLAVOURS, VARIANTS, BundleOf, Prepare
from tests.tiny import runs_rows, tiny

OUTPUTS = {"entropy.entropy", "entropy.logits", "encoder.byte_states", "latent.patch_kv", "decoder.logits"}
OUTPUTS |= {"hash_embedding"}
BATCHED = {"batched.logits", "batched.entropy"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_output_agrees_with_pytorch(bundle_of: BundleOf, variant: str, flavour: str) -> None:
    report = bundle_of(variant, flavour)
    assert {row.output for row in report.parity} == OUTPUTS | (
        BATCHED if report.manifest.row_graphs and runs_rows() else set()
    )
    assert bool(report.manifest.row_graphs) == (flavour != "portable" and variant != "all_layers_gqa_projection")
    for row in report.parity:
        assert row.error <= row.tolerance == 2e-5
        assert row.positions >= 50
        assert row.measure == "largest"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_bundle_opens_and_describes_itself(bundle_of: BundleOf, variant: str, flavour: str) -> None:
    report = bundle_of(variant, flavour)
    opened = Bundle.open(report.path, verify="full")
    assert opened.manifest == report.manifest
    assert opened.manifest.flavour == flavour
    assert opened.manifest.spec.chunk_crosses_documents == (flavour == "portable")
    tables, own = opened.hash_tables()["encoder"], tiny(variant).require_blt()[0].hash_embedding
    assert own is not None
    np.testing.assert_array_equal(tables, np.concatenate([own.table(t).detach() for t in range(own.config.n_tables)]))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_graphs_have_the_names_shapes_and_operators_of_their_spec(bundle_of: BundleOf, flavour: str) -> None:
    report = bundle_of(VARIANTS[1], flavour)
    for name, spec in report.manifest.spec.graphs.items():
        graph = ir.load(report.path / f"{name}.onnx").graph
        assert [v.name for v in graph.inputs] == [t.name for t in spec.inputs]
        assert [v.name for v in graph.outputs] == [t.name for t in spec.outputs]
        assert spec.cache is not None
        free = flavour == "ort" and spec.cache.kind == "linear"
        for v, t in zip((*graph.inputs, *graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
            cached = t.name in spec.aliases or t.name in spec.aliases.values()
            assert dims(v) == ([*t.shape[:2], "C", *t.shape[3:]] if free and cached else list(t.shape))
        assert {node.domain for node in graph} <= ({"", "com.microsoft"} if flavour == "ort" else {""})
        for node in graph:
            if node.op_type == "MatMul" and has_constant_weight(node):
                weight = node.inputs[1]
                assert weight is not None
                assert (weight.name or "").endswith(".weight.T")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_graphs_hold_only_operators_that_the_runtime_allows(bundle_of: BundleOf, variant: str, flavour: str) -> None:
    allowed = graph_file.operators(flavour, quantised=False)
    used = {(node.domain, node.op_type) for graph in written_graphs(bundle_of(variant, flavour)) for node in graph}
    assert used <= allowed
    assert len(used) > 20


def test_an_operator_that_the_runtime_refuses_leaves_no_bundle(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_file, "STANDARD", graph_file.STANDARD - {"Softmax"})
    with pytest.raises(BltError, match=r"'make the manifest'.*operator 'Softmax'"):
        pipeline.run(replace(prepare(VARIANTS[0], "portable"), check=False), tmp_path / "b")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_graphs_hold_no_stack_trace_and_no_path(bundle_of: BundleOf, flavour: str) -> None:
    report = bundle_of(VARIANTS[1], flavour)
    for path in report.path.glob("*.onnx"):
        content = path.read_bytes()
        assert not [word for word in (b".py", b"/site-packages", b"stack_trace", b"File ") if word in content]
    for graph in written_graphs(report):
        noted = (graph, *graph, *graph.inputs, *(v for node in graph for v in node.outputs))
        assert not [x for x in noted if x.metadata_props or x.doc_string]


def written_graphs(report: ExportReport) -> list[ir.Graph]:
    return [ir.load(path).graph for path in sorted(report.path.glob("*.onnx"))]


def test_both_flavours_come_from_one_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, real = [], trace.capture

    def count(*args: Any, **more: Any) -> ir.Model:
        captured.append(args)
        return real(*args, **more)

    monkeypatch.setattr(trace, "capture", count)
    models: dict[str, ir.Model] = {}
    for flavour in FLAVOURS:
        state = pipeline.prepare(tiny("no_hash_space_causal_latent"), flavour, capacity=600)
        state.captured = models
        pipeline.run(state, tmp_path / flavour)
    assert len(captured) == len(models) == 3
    for model in models.values():  # still bare: lowering worked on copies
        assert op_counts(model)["blt.CachedAttention"] > 0


def test_each_step_reports_what_it_changed(prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    with caplog.at_level(logging.DEBUG, logger="blt_export"):
        report = pipeline.run(prepare(VARIANTS[0], "ort"), tmp_path / "b", progress=seen.append)
    assert seen == [step.name for step in pipeline.STEPS] == [step.name for step in report.steps]
    assert all(step.changed for step in report.steps)
    assert "+2 com.microsoft.GroupQueryAttention" in caplog.text


def test_a_wrong_weight_fails_parity_and_leaves_no_bundle(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = bundle.write_graph

    def corrupt(model: ir.Model, folder: Path, name: str) -> Path:
        path = written(model, folder, name)
        if name == "decoder":
            weights = np.memmap(folder / "decoder.weights", np.float32, "r+")
            weights[np.flatnonzero(weights)[100:132]] += 0.05
        return path

    monkeypatch.setattr(bundle, "write_graph", corrupt)
    with pytest.raises(CheckFailed, match=r"decoder\.logits differs from PyTorch by .* \(tolerance 2e-05\)"):
        pipeline.run(prepare(VARIANTS[0], "ort"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_table_fails_parity(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = bundle.write_hash_tables

    def corrupt(tables: StoredTensor, path: Path, dtype: TableDtype) -> Path:
        return written(replace(tables, pieces=(tables.pieces[0].roll(1, 0),)), path, dtype)

    monkeypatch.setattr(bundle, "write_hash_tables", corrupt)
    with pytest.raises(CheckFailed, match="hash_embedding differs from PyTorch"):
        pipeline.run(prepare(VARIANTS[0], "ort"), tmp_path / "bundle")


def test_tables_of_an_entropy_model_have_their_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pipeline.run(exports.prepare("hash_entropy_without_layers", table_dtype="float16"), tmp_path / "b")
    spec = report.manifest.spec
    assert {name: hash.dtype for name, hash in spec.hashes.items()} == {"encoder": "float16", "entropy": "float16"}
    assert [row.output for row in report.parity[:2]] == ["entropy.hash_embedding", "hash_embedding"]
    tables = Bundle.open(tmp_path / "b", verify="full").hash_tables()
    assert {name: table.shape for name, table in tables.items()} == {"encoder": (3 * 97, 32), "entropy": (4 * 101, 24)}
    assert spec.graphs["entropy"].cache is None
    written = bundle.write_hash_tables

    def corrupt(tables: StoredTensor, path: Path, dtype: TableDtype) -> Path:
        rolled = replace(tables, pieces=(tables.pieces[0].roll(1, 0),))
        return written(rolled if path.name == bundle.HASH_TABLES["entropy"] else tables, path, dtype)

    monkeypatch.setattr(bundle, "write_hash_tables", corrupt)
    with pytest.raises(CheckFailed, match=r"entropy\.hash_embedding differs from PyTorch"):
        pipeline.run(exports.prepare("hash_entropy_without_layers"), tmp_path / "wrong")


def test_no_check_writes_no_parity_rows(prepare: Prepare, tmp_path: Path) -> None:
    state = prepare(VARIANTS[0], "ort")
    state.check = False
    assert pipeline.run(state, tmp_path / "b").parity == ()


def test_an_older_bundle_is_replaced_only_by_force(prepare: Prepare, tmp_path: Path) -> None:
    out = tmp_path / "b"
    state = prepare(VARIANTS[0], "ort")
    state.check = False
    pipeline.run(state, out)
    (out / "stale").write_text("x")
    Bundle.open(out)  # an unlisted file is no obstacle
    with pytest.raises(UsageError, match="holds a bundle already"):
        pipeline.run(state, out)
    pipeline.run(state, out, force=True)
    assert not (out / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="does not hold a bundle; give a new folder"):
        bundle.check_target(tmp_path, force=True)


def test_bad_arguments() -> None:
    checkpoint = tiny(VARIANTS[0])
    with pytest.raises(UsageError, match="bf16 runs on GPUs"):
        blt_export.export(checkpoint, "unused", precision="bf16")
    with pytest.raises(UsageError, match="precision 'fp31'"):
        blt_export.export(checkpoint, "unused", precision="fp31")
    with pytest.raises(UsageError, match="choose one of ort, cuda, portable"):
        blt_export.export(checkpoint, "unused", flavour="onnx")
    with pytest.raises(UsageError, match="table_dtype 'int4'"):
        blt_export.export(checkpoint, "unused", table_dtype="int4")
    with pytest.raises(CheckpointError, match="does not exist"):
        blt_export.export("no/such/model.pt", "unused")


def test_hash_tables_are_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 4 * 3 * 5)
    pieces = tuple(torch.randn(n, 3) for n in (17, 4))
    want = torch.cat(pieces)
    for dtype, stored in (
        ("float32", want),
        ("float16", want.half()),
        ("bfloat16", want.bfloat16().view(torch.uint16)),
    ):
        path = bundle.write_hash_tables(StoredTensor(("a", "b"), pieces), tmp_path / "t.npy", cast(TableDtype, dtype))
        np.testing.assert_array_equal(np.load(path, allow_pickle=False), stored.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tables_keep_the_dtype_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    """A bundle from half-precision weights holds the same numbers, not twice the bytes."""
    save(tmp_path / "model.pt", tiny(), dtype)
    state = pipeline.prepare(tmp_path / "model.pt", "ort")
    report = pipeline.run(state, tmp_path / "bundle")
    kept = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    assert report.manifest.spec.hash is not None
    assert report.manifest.spec.hash.dtype == kept
    assert report.parity[0].output == "hash_embedding"
    assert report.parity[0].error <= 1e-6
    other = pipeline.prepare(tmp_path / "model.pt", "ort", table_dtype="bfloat16")
    other.captured = state.captured
    narrow = pipeline.run(other, tmp_path / "narrow")
    tables = Bundle.open(tmp_path / "narrow").hash_tables()["encoder"]
    assert tables.dtype == np.uint16
    assert (narrow.parity[0].error > 1e-4) == (dtype != torch.bfloat16)


def test_an_error_names_the_graph_the_step_and_the_one_before(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = prepare(VARIANTS[0], "ort")
    graph = state.spec.graphs["latent"]
    monkeypatch.setitem(state.spec.graphs, "latent", replace(graph, outputs=graph.outputs[:-1], aliases={}))
    with pytest.raises(BltError, match=r"'name inputs and outputs' \(after 'capture'\): graph latent: .* has 5 values"):
        pipeline.run(state, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_cannot_be_traced_is_named(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> ir.Model:
        raise RuntimeError("data-dependent branch")

    state = prepare(VARIANTS[0], "ort")
    state.captured = {}
    monkeypatch.setattr(trace, "capture", refuse)
    with pytest.raises(BltError, match=r"step 'capture' .*: graph encoder: data-dependent branch"):
        pipeline.run(state, tmp_path / "b")

"""The compile gate: TensorRT-RTX builds every portable graph; a refused graph or an ignored input is an error."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from blt.checkpoint.models import save
from blt.cli import run
from blt_export import ExportReport, aot, pipeline
from blt_export.bundle import write_graph
from blt_export.passes import keep_states
from blt_runtime.bundle.spec import GraphSpec, TensorSpec, padded_spec, resident_spec
from blt_runtime.errors import CheckFailed, MissingExtra
from tests.export.variants import VARIANTS, BundleOf
from tests.exports import prepare
from tests.tiny import tiny

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra aot)"
)


@needs_tensorrt
@pytest.mark.parametrize("graph", ["entropy", "encoder", "latent", "decoder"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_portable_graphs_compile(bundle_of: BundleOf, variant: str, graph: str) -> None:
    report = bundle_of(variant, "portable")
    spec = report.manifest.spec.graphs[graph]
    compiled = aot.compile_graph(report.path / f"{graph}.onnx", spec)
    assert set(compiled.outputs) == {t.name for t in spec.outputs}
    assert compiled.plan_bytes > 0


@pytest.fixture(scope="module")
def precise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    state = prepare("cross_windows_own_heads_newlines", "portable", precision=request.param, check=False)
    return pipeline.run(state, tmp_path_factory.mktemp("precise") / "b")


NARROW = ("fp16", "bf16", "int8", "int4")
FORMS = [
    *((precision, form) for precision in NARROW for form in ("plain", "resident")),
    *((precision, "padded") for precision in ("fp32", "fp16", "bf16")),
]


@needs_tensorrt
@pytest.mark.parametrize("graph", ["entropy", "encoder", "latent", "decoder"])
@pytest.mark.parametrize(("precise", "form"), FORMS, indirect=["precise"])
def test_forms_of_portable_graphs_compile(precise: ExportReport, form: str, graph: str, tmp_path: Path) -> None:
    """Plain, with byte states and patch vectors in memory of the graphs, and padded to rows of one length."""
    path, wanted = precise.path / f"{graph}.onnx", precise.manifest.spec.graphs[graph]
    if form != "plain":
        wanted = resident_spec(precise.manifest.spec, cached=True).graphs[graph]
        wanted = padded_spec(wanted) if form == "padded" else wanted
        path = write_graph(keep_states.run(ir.load(path), wanted), tmp_path, graph)
    compiled = aot.compile_graph(path, wanted)
    assert set(compiled.outputs) == {t.name for t in wanted.outputs}


def _one_node(path: Path, op_type: str, *, unused: bool = False) -> GraphSpec:
    x, y = (ir.Value(name=n, shape=ir.Shape(["B", 4]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "xy")
    node = ir.node(op_type, [x], num_outputs=1)
    node.outputs[0].name = "out"
    node.outputs[0].dtype = ir.DataType.INT64 if op_type == "NonZero" else ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["R", "N"] if op_type == "NonZero" else ["B", 4])
    graph = ir.Graph([x, y] if unused else [x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    ir.save(ir.Model(graph, ir_version=11), path)
    tensors = tuple(TensorSpec(v.name or "", "float32", ("B", 4)) for v in graph.inputs)
    return GraphSpec("g", tensors, (TensorSpec("out", "float32", ("B", 4)),), {}, None)


@needs_tensorrt
def test_a_refused_operator_is_named(tmp_path: Path) -> None:
    spec = _one_node(tmp_path / "g.onnx", "NonZero")
    with pytest.raises(CheckFailed, match=r"compile gate: g is refused: .*NonZero"):
        aot.compile_graph(tmp_path / "g.onnx", spec)


@needs_tensorrt
def test_an_input_that_the_network_lacks_is_named(tmp_path: Path) -> None:
    spec = _one_node(tmp_path / "g.onnx", "Relu")
    more = replace(spec, inputs=(*spec.inputs, TensorSpec("nonpad", "int64", ("B",))))
    with pytest.raises(CheckFailed, match="g ignores its inputs nonpad"):
        aot.compile_graph(tmp_path / "g.onnx", more)


def test_without_tensorrt_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra, match="blt-lm\\[aot\\]"):
        aot.compile_graph("unused.onnx", GraphSpec("g", (), (), {}, None))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aot") / "model.pt"
    save(path, tiny("no_hash_space_causal_latent"))
    return path


def _export(checkpoint: Path, out: Path, *options: str) -> int:
    return run(["export", str(checkpoint), "-o", str(out), "--no-check", "--check-aot", "-q", *options])


@needs_tensorrt
def test_export_prints_what_the_compiler_accepts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _export(checkpoint, tmp_path / "b", "--flavour", "portable") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["graph", "accepted", "seconds"]
    assert [line.split()[:2] for line in lines[2:5]] == [["encoder", "yes"], ["latent", "yes"], ["decoder", "yes"]]


def test_a_refused_graph_is_exit_code_3_after_all_graphs_were_tried(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, spec: GraphSpec) -> None:
        if spec.name == "encoder":
            raise CheckFailed("compile gate: encoder is refused: NonZero")

    monkeypatch.setattr(aot, "_library", lambda: None)
    monkeypatch.setattr(aot, "compile_graph", refuse)
    assert _export(checkpoint, tmp_path / "b", "--flavour", "portable", "--json") == 3
    printed = capsys.readouterr()
    accepted = {attempt["graph"]: not attempt["refused"] for attempt in json.loads(printed.out)["aot"]}
    assert accepted == {"encoder": False, "latent": True, "decoder": True}
    assert "encoder is refused: NonZero (the bundle was written)" in printed.err
    assert (tmp_path / "b" / "manifest.json").exists()


def test_export_names_the_extra_before_it_does_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    assert _export(checkpoint, tmp_path / "b", "--flavour", "portable") == 4
    assert "blt-lm[aot]" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_gate_is_for_the_flavour_portable(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _export(checkpoint, tmp_path / "b") == 2
    assert "the compile gate is for the flavour portable, not ort" in capsys.readouterr().err

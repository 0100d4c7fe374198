"""Quantised exports: which matrices become codes, that parity fails for wrong codes, and what is reported."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import blt_export
from blt.checkpoint.models import Checkpoint
from blt.model import HashConfig
from blt_export import ExportReport, aot, pipeline
from blt_export.graph_files import write_graph
from blt_export.passes import halve
from blt_export.quantize import eight_bit_floats, matrices
from blt_export.quantize.blockwise import Blocks, Format, quantise
from blt_export.rewrite import Builder, op_counts
from blt_export.rewrite import replace as replace_node
from blt_export.state import ExportState
from blt_export.verify import errors, parity
from blt_export.verify.parity import GraphRun
from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxBackend
from blt_runtime.bundle import graph_file
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.spec import GraphSpec, TensorSpec
from blt_runtime.errors import CheckFailed, UsageError
from blt_runtime.ids import encode
from blt_runtime.patching import PatchRule
from tests import tiny as tinies
from tests.export.small_graphs import constant, finish, has_constant_weight, model_of, value, weight
from tests.export.variants import VARIANTS, Prepare
from tests.exports import CAPACITY, CHUNK

NBITS = "com.microsoft.MatMulNBits"
STANDARD = {"entropy": "int4", "encoder": "int4", "latent": "int4", "decoder": "int8"}
TEXT = "A short text, scored twice: once in float32, once in the bundle.\n" * 6
MakeQuantised = Callable[..., ExportState]


@pytest.fixture(scope="module")
def wide() -> Checkpoint:
    """Widths of 128, so that blocks of 128 fit. One entropy layer, one layer a stage."""
    config = tinies.PLAIN.model_copy(
        update={
            "encoder": tinies.stack(128, 1, 2, window=24, ffn_dim=128),
            "latent": tinies.stack(256, 1, 4, ffn_dim=128),
            "decoder": tinies.stack(128, 1, 2, window=24, ffn_dim=128),
            "hash": HashConfig(sizes=(3, 4), rows=97),
        }
    )
    entropy = tinies.ENTROPY.model_copy(update={"dim": 128, "n_layers": 1, "ffn_dim": 128})
    return tinies.random_checkpoint(config, PatchRule("entropy", threshold=0.0), entropy_config=entropy)


@pytest.fixture(scope="module")
def make_quantised(wide: Checkpoint) -> MakeQuantised:
    """(precision, flavour, precision_of) -> an export's state; all share one capture."""
    captured: dict[str, ir.Model] = {}

    def make(precision: str, flavour: str = "ort", **precision_of: str) -> ExportState:
        state = pipeline.prepare(
            wide, flavour, precision=precision, capacity=CAPACITY, chunk=CHUNK, precision_of=precision_of
        )
        state.captured = captured
        return state

    return make


@pytest.fixture(scope="module")
def mixed(make_quantised: MakeQuantised, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """entropy float32, decoder 4 bits, the others 8 bits; evaluated on a text."""
    state = make_quantised("int8", entropy="fp32", decoder="int4")
    state.eval_ids = [encode(TEXT, bos=True), encode(TEXT.upper(), bos=True, eos=True)]
    return pipeline.run(state, tmp_path_factory.mktemp("mixed") / "bundle")


def graph(report: ExportReport, name: str) -> ir.Model:
    return ir.load(report.path / f"{name}.onnx")


def test_every_matrix_of_the_chosen_graphs_becomes_codes(mixed: ExportReport) -> None:
    for name, (bits, block) in {"encoder": (8, 128), "latent": (8, 128), "decoder": (4, 32)}.items():
        model = graph(mixed, name)
        found = [node for node in model.graph if node.op_type == "MatMulNBits"]
        assert found
        assert not [n for n in model.graph if n.op_type == "MatMul" and has_constant_weight(n)]
        for node in found:
            attributes = {key: of.value for key, of in node.attributes.items()}
            assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (bits, block, 4)
    assert op_counts(graph(mixed, "entropy"))[NBITS] == 0


def test_only_codes_are_narrow(mixed: ExportReport) -> None:
    """No float copy of a quantised weight is left, and embeddings, norms and rotary tables are float32."""
    initializers = graph(mixed, "encoder").graph.initializers
    codes = {name for name, value in initializers.items() if value.dtype is ir.DataType.UINT8}
    assert codes == {name for name in initializers if name.endswith(".codes")}
    assert not [name for name in initializers if f"{name}.codes" in initializers]
    widths = {v.dtype for name, v in initializers.items() if name not in codes and v.dtype is not None}
    assert widths <= {ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32}
    assert any("embed" in name for name in initializers)


def test_the_manifest_holds_the_precision_of_each_graph(mixed: ExportReport) -> None:
    manifest = Bundle.open(mixed.path).manifest
    assert manifest.precision == "int8"
    assert manifest.precisions == {"entropy": "fp32", "encoder": "int8", "latent": "int8", "decoder": "int4"}
    tolerances = {row.output: row.tolerance for row in manifest.parity}
    assert tolerances["entropy.logits"] == 2e-5
    assert tolerances["encoder.byte_states"] == errors.TOLERANCE["int8"]
    assert tolerances["decoder.logits"] == errors.TOLERANCE["int4"]
    assert "entropy.weights" not in tolerances
    assert tolerances["latent.weights"] == Format(8, 128).largest_error


def test_quantised_graphs_hold_only_operators_that_the_runtime_allows(mixed: ExportReport) -> None:
    for path in mixed.path.glob("*.onnx"):
        quantised = not path.name.startswith("entropy")
        used = {(node.domain, node.op_type) for node in ir.load(path).graph}
        assert used <= graph_file.operators("ort", quantised)
        assert (("com.microsoft", "MatMulNBits") in used) == quantised


def test_quantised_outputs_differ_but_not_much(mixed: ExportReport) -> None:
    errors = {row.output: row.error for row in mixed.parity}
    assert 1e-3 < errors["latent.patch_kv"] < 0.05
    assert 1e-2 < errors["decoder.logits"] < 0.3


def test_the_step_reports_what_it_changed(mixed: ExportReport) -> None:
    reported = next(step.changed for step in mixed.steps if step.name == "quantise")
    assert "encoder, int8: " in reported
    assert "decoder, int4: " in reported
    assert "entropy" not in reported
    assert " bytes now " in reported


def test_the_bundle_is_evaluated_on_text(mixed: ExportReport) -> None:
    evaluated = Bundle.open(mixed.path).manifest.judged
    assert evaluated is not None
    assert evaluated == mixed.manifest.judged
    assert evaluated.bytes == 2 * len(TEXT)
    assert evaluated.bits_per_byte != evaluated.float_bits_per_byte
    assert evaluated.bits_per_byte == pytest.approx(evaluated.float_bits_per_byte, rel=0.05)
    assert evaluated.boundaries > 10
    assert (evaluated.boundaries_lost, evaluated.boundaries_new) == (0, 0)  # the entropy model is float32


def test_boundaries_that_a_quantised_entropy_model_moves_are_counted(
    make_quantised: MakeQuantised, tmp_path: Path
) -> None:
    state = make_quantised("fp32", entropy="int4")
    state.eval_ids = [encode(TEXT, bos=True)]
    evaluated = pipeline.run(state, tmp_path / "b").manifest.judged
    assert evaluated is not None
    assert evaluated.boundaries_lost + evaluated.boundaries_new > 0


def test_the_runtime_runs_it_and_always_packs_it(mixed: ExportReport, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: dict[str, bool] = {}
    real = OnnxBackend._open

    def open_(self: OnnxBackend, bundle: Bundle, spec: GraphSpec, options: Any) -> object:
        packed[spec.name] = options.get_session_config_entry("session.disable_prepacking") == "0"
        return real(self, bundle, spec, options)

    monkeypatch.setattr(OnnxBackend, "_open", open_)
    opened = Bundle.open(mixed.path)
    backend = OnnxBackend(opened, prepack=False)
    assert packed == {name: name != "entropy" for name in opened.manifest.spec.graphs}
    stream = Model(opened.manifest.spec, backend, opened.hash_tables()).stream()
    stream.append(TEXT[:40])
    assert len(list(stream.generate_ids(20, temperature=0, stop_at_eos=False))) == 20
    assert np.isfinite(stream.logits).all()


def _scaled(blocks: Blocks) -> Blocks:
    return replace(blocks, scales=blocks.scales * np.float32(2))


def _swapped(blocks: Blocks) -> Blocks:
    return replace(blocks, codes=(blocks.codes << 4 | blocks.codes >> 4).astype(np.uint8))


def _rolled(blocks: Blocks) -> Blocks:
    return replace(blocks, codes=np.roll(blocks.codes, 1, 0))


FAULTS = {"int8": (_scaled, _rolled), "int4": (_scaled, _swapped, _rolled)}
REST = {"ort": "fp32", "portable": "fp16"}
CASES = [(flavour, precision, fault) for flavour in REST for precision, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(("flavour", "precision", "fault"), CASES)
def test_one_wrong_weight_fails_parity_and_leaves_no_bundle(
    make_quantised: MakeQuantised,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
    precision: str,
    fault: Callable[[Blocks], Blocks],
) -> None:
    """One block of one weight of the decoder is wrong in the file."""
    done: list[int] = []

    def pack(w_NK: np.ndarray, form: Format) -> Blocks:
        blocks = quantise(w_NK, form)
        if done:
            return blocks
        done.append(1)
        wrong, codes, scales = fault(blocks), blocks.codes.copy(), blocks.scales.copy()
        codes[7, 0], scales[7, 0] = wrong.codes[7, 0], wrong.scales[7, 0]
        return Blocks(codes, scales, blocks.zeros)

    monkeypatch.setattr(matrices, "quantise", pack)
    with pytest.raises(CheckFailed, match=r"parity: decoder\.weights differs"):
        pipeline.run(make_quantised(REST[flavour], flavour, decoder=precision), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flavour", "precision", "fault"), CASES)
def test_a_graph_that_reads_its_codes_in_another_way_fails(
    make_quantised: MakeQuantised,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
    precision: str,
    fault: Callable[[Blocks], Blocks],
) -> None:
    """Even if packing and reading back were wrong in the same way, the graph's outputs show it."""
    monkeypatch.setattr(matrices, "quantise", lambda w_NK, form: fault(quantise(w_NK, form)))
    monkeypatch.setattr(parity, "read_error", lambda *_: 0.0)
    with pytest.raises(CheckFailed, match=r"parity: decoder\.logits differs"):
        pipeline.run(make_quantised(REST[flavour], flavour, decoder=precision), tmp_path / "b")


@pytest.fixture(scope="module")
def on_devices(make_quantised: MakeQuantised, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """The flavour cuda: decoder 8 bits, the others 4 bits."""
    return pipeline.run(make_quantised("int4", "cuda", decoder="int8"), tmp_path_factory.mktemp("cuda") / "bundle")


def test_for_devices_matrices_become_codes_and_the_rest_float16(on_devices: ExportReport) -> None:
    for name, bits in {"entropy": 4, "encoder": 4, "latent": 4, "decoder": 8}.items():
        for path in on_devices.path.glob(f"{name}*.onnx"):
            model = ir.load(path)
            found = [node for node in model.graph if node.op_type == "MatMulNBits"]
            assert found
            assert not [n for n in model.graph if n.op_type == "MatMul" and has_constant_weight(n)]
            for node in found:
                attributes = {key: of.value for key, of in node.attributes.items()}
                assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (bits, 32, 0)
                assert len(node.inputs) == 3  # no zero points
            large = [v for v in model.graph.initializers.values() if np.prod(v.shape.numpy()) > 8 and v.dtype]  # type: ignore[union-attr]
            assert {v.dtype for v in large} <= {ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT64}
    spec = on_devices.manifest.spec.graphs["latent"]
    assert spec.tensor("byte_states").dtype == "float16"


def test_for_devices_outputs_are_within_the_tolerance_of_their_bits(on_devices: ExportReport) -> None:
    """In batches too. The weights are as far from the float ones as rounding makes them."""
    rows = {row.output: row for row in on_devices.parity}
    for name, precision in {"entropy": "int4", "encoder": "int4", "latent": "int4", "decoder": "int8"}.items():
        form = matrices.DEVICE_FORMATS[precision]
        assert 0 < rows[f"{name}.weights"].error <= rows[f"{name}.weights"].tolerance == form.largest_error
        assert rows[f"{name}.weights"].measure == "block"
    assert rows["encoder.byte_states"].tolerance == errors.TOLERANCE["int4"]
    assert rows["encoder.byte_states"].measure == "rms"
    assert rows["decoder.logits"].tolerance == errors.TOLERANCE["int8"]
    assert rows["decoder.logits"].error > 1e-4
    assert "batched.logits" in rows


def test_for_devices_streams_are_the_same_where_the_graphs_keep_states(on_devices: ExportReport) -> None:
    bundle = Bundle.open(on_devices.path)
    found = []
    for resident in (False, True):
        backend = OnnxBackend(bundle, resident=resident)
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
        stream.append("Grüße\naus 東京 " * 4)
        found.append((list(stream.generate_ids(12, temperature=0.0, stop_at_eos=False)), stream.logits.copy()))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_for_devices_4_bits_and_bfloat16_are_evaluated_together(make_quantised: MakeQuantised, tmp_path: Path) -> None:
    state = make_quantised("int4", "cuda", entropy="bf16")
    state.eval_ids = [encode(TEXT, bos=True)]
    judged = pipeline.run(state, tmp_path / "b").manifest.judged
    assert judged is not None
    assert 0 < abs(judged.bits_per_byte - judged.float_bits_per_byte) < 0.2


@pytest.fixture(scope="module")
def standard(make_quantised: MakeQuantised, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """The flavour portable: decoder 8 bits, the others 4 bits."""
    return pipeline.run(make_quantised("int4", "portable", decoder="int8"), tmp_path_factory.mktemp("p") / "bundle")


def test_in_standard_operators_stored_matrices_are_codes_and_the_rest_is_float16(standard: ExportReport) -> None:
    for name, precision in STANDARD.items():
        model = graph(standard, name)
        products = [node for node in model.graph if node.op_type == "MatMul"]
        assert not [node for node in products if has_constant_weight(node)]
        found = [node for node in model.graph if node.op_type == "DequantizeLinear"]
        assert {node.outputs[0] for node in found} <= {node.inputs[1] for node in products}
        assert found
        for node in found:
            codes, scales = (of.const_value for of in node.inputs if of is not None)
            assert codes is not None and scales is not None  # noqa: PT018
            (k, n), attributes = codes.shape.numpy(), {key: of.value for key, of in node.attributes.items()}
            if precision == "int8":
                assert (attributes, scales.shape.numpy()) == ({"axis": 1}, (n,))
            else:
                assert (attributes, scales.shape.numpy()) == ({"axis": 0, "block_size": 32}, (k // 32, n))
            assert codes.dtype is {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}[precision]
            assert (scales.numpy() > 0).all() or precision == "int4"
        large = [v for v in model.graph.initializers.values() if np.prod(v.shape.numpy()) > 8 and v.dtype]  # type: ignore[union-attr]
        narrow = {ir.DataType.INT8 if precision == "int8" else ir.DataType.INT4}
        assert narrow < {v.dtype for v in large} <= narrow | {ir.DataType.FLOAT16, ir.DataType.INT64}
        used = {(node.domain, node.op_type) for node in model.graph}
        assert used <= graph_file.operators("portable", True)
    assert standard.manifest.arithmetic() == {"fp16"}


def test_in_standard_operators_outputs_are_within_the_tolerance_of_their_bits(standard: ExportReport) -> None:
    rows = {row.output: row for row in standard.parity}
    for name, precision in STANDARD.items():
        row, form = rows[f"{name}.weights"], matrices.STANDARD_FORMATS[precision]
        assert 0 < row.error <= row.tolerance == form.largest_error
    assert rows["encoder.byte_states"].tolerance == errors.TOLERANCE["int4"]
    assert rows["decoder.logits"].tolerance == errors.TOLERANCE["int8"]


@pytest.mark.parametrize("name", ["entropy", "decoder"])
def test_the_cpu_multiplies_by_the_exact_weights(standard: ExportReport, tmp_path: Path, name: str) -> None:
    """The bits of a graph whose matrices are stored as float16: left sides are not rounded to 8 bits."""
    model = graph(standard, name)
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        codes, scales = (constant(of) for of in node.inputs)
        codes_KN = codes.astype(np.float16)
        blocks = codes_KN.shape[0] // len(scales) if scales.ndim == 2 else 1
        floats = codes_KN * (np.repeat(scales, blocks, 0) if scales.ndim == 2 else scales)
        replace_node(node, [Builder(model.graph, node).const(floats, np.float16)])
    path = write_graph(model, tmp_path, name)
    spec, rng, found = standard.manifest.spec.graphs[name], np.random.default_rng(0), []
    given = {}
    for tensor in spec.inputs:
        if tensor.name not in spec.aliases.values():
            shape = tensor.resolve(B=1, S=5, N=9, R=9)
            some = rng.integers(0, 4, shape) if tensor.dtype == "int64" else rng.standard_normal(shape)
            given[tensor.name] = some.astype(tensor.dtype)
    given |= {"positions": np.arange(5)[None], "doc_start": np.zeros((1, 5), np.int64)}
    for file in (standard.path / f"{name}.onnx", path):
        found.append(GraphRun(file, spec)(given))
    for output, got in found[0].items():
        np.testing.assert_array_equal(got, found[1][output])


def product(precision: str, size: int, folder: Path) -> tuple[Path, GraphSpec]:
    """y [B, N] = x [B, K] W of float16, with a square W of that precision, as a file."""
    model, b = model_of([value("x", "B", size)])
    w_KN = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    y = b.op("MatMul", model.graph.inputs[0], weight(model, "w", w_KN), dtype=ir.DataType.FLOAT, shape=["B", size])
    y.name = "y"
    finish(model, y)
    matrices.run(model, precision, "portable")
    halve.run(model, "fp16")
    if precision == "fp8":
        eight_bit_floats.run(model)
    x_, y_ = (TensorSpec(name, "float16", ("B", size)) for name in "xy")
    return write_graph(model, folder, precision), GraphSpec("g", (x_,), (y_,), {}, None)


needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra aot)"
)


@needs_tensorrt
def test_in_plans_of_tensorrt_matrices_stay_packed(tmp_path: Path) -> None:
    """One product of 1024 x 1024, since the plans of whole tiny graphs are kernels for the most part."""
    bits = {"fp16": 16, "int8": 8, "int4": 4, "fp8": 8}
    sizes = {p: aot.compile_graph(*product(p, 1024, tmp_path)).plan_bytes for p in bits}
    for precision, narrow in bits.items():
        assert sizes["fp16"] - sizes[precision] >= 0.8 * 1024 * 1024 * (16 - narrow) / 8


@needs_tensorrt
@pytest.mark.parametrize(
    ("gpu", "refused"),
    [("SM75", {"int4", "fp8"}), ("SM80", {"fp8"}), ("SM86", {"fp8"}), ("SM89", set()), ("SM120", set())],
)
def test_tensorrt_compiles_each_precision_for_these_gpus(tmp_path: Path, gpu: str, refused: set[str]) -> None:
    """The statements of docs/gpu.md, and the reason of `build.FP8_FROM`."""
    for precision in ("fp16", "int8", "int4", "fp8"):
        path, spec = product(precision, 64, tmp_path)
        with pytest.raises(CheckFailed, match="HW-specific") if precision in refused else nullcontext():
            aot.compile_graph(path, spec, architectures=(gpu,))


def test_matrices_that_do_not_divide_stay_float_with_a_reason(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Latent width 48: no multiple of 32, but its feed-forward (96) is; the other stages are 32 and 64 wide."""
    state = prepare(VARIANTS[0], "ort")
    state.precisions = dict.fromkeys(state.spec.graphs, "int4")
    with caplog.at_level(logging.INFO, logger="blt_export"):
        report = pipeline.run(state, tmp_path / "b")
    reported = next(step.changed for step in report.steps if step.name == "quantise")
    assert "48 inputs are no multiple of 32" in reported
    assert op_counts(graph(report, "latent"))[NBITS] > 0
    assert op_counts(graph(report, "latent"))["MatMul"] > 0


def test_a_graph_without_any_such_matrix_stays_float_with_a_warning(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = prepare(VARIANTS[0], "ort")
    state.precisions["encoder"] = "int8"
    report = pipeline.run(state, tmp_path / "b")
    assert report.manifest.precision_of("encoder") == "fp32"
    assert "nothing in the graph encoder could become int8" in caplog.text


def test_bad_precisions() -> None:
    checkpoint = tinies.tiny("static")
    with pytest.raises(UsageError, match="give all three the same precision"):
        blt_export.export(checkpoint, "unused", precision_of={"latent": "fp16"})
    with pytest.raises(UsageError, match="precision 'int7'"):
        blt_export.export(checkpoint, "unused", precision="int7")
    with pytest.raises(UsageError, match=r"no such graph.*latent"):
        blt_export.export(checkpoint, "unused", precision_of={"latnet": "int8"})
    with pytest.raises(UsageError, match="'entropy': this model has no such graph"):
        blt_export.export(checkpoint, "unused", precision_of={"entropy": "fp32"})

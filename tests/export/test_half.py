"""Half precision: what becomes half, that the graphs agree with PyTorch, and with their emulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import blt_export
from blt.checkpoint.models import save
from blt.cli import run as cli
from blt_export import ExportReport, pipeline, steps
from blt_export.bundle import write_graph
from blt_export.passes.halve import half_spec
from blt_export.verify import emulate, text
from blt_export.verify.errors import TOLERANCE
from blt_export.verify.parity import GraphRun
from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxBackend
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import Judged
from blt_runtime.errors import BackendError, UsageError
from blt_runtime.ids import EOS
from tests.exports import prepare
from tests.tiny import tiny

VARIANTS = ("cross_windows_own_heads_newlines", "no_hash_space_causal_latent")
CASES = [(f, p) for f in ("ort", "cuda", "portable") for p in ("fp16", "bf16") if (f, p) != ("ort", "bf16")]
Export = Callable[[str, str, str], ExportReport]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """(variant, flavour, precision) -> its report, exported once."""
    done: dict[tuple[str, str, str], ExportReport] = {}

    def run(variant: str, flavour: str, precision: str) -> ExportReport:
        key = (variant, flavour, precision)
        if key not in done:
            done[key] = pipeline.run(prepare(variant, flavour, precision=precision), tmp_path_factory.mktemp("h") / "b")
        return done[key]

    return run


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("flavour", "precision"), CASES)
def test_every_output_agrees_with_pytorch(export: Export, variant: str, flavour: str, precision: str) -> None:
    manifest = export(variant, flavour, precision).manifest
    rows = [row for row in manifest.parity if row.output != "hash_embedding"]
    assert {row.output.split(".")[0] for row in rows} - {"batched"} == set(manifest.spec.graphs)
    for row in rows:
        assert row.error <= row.tolerance == TOLERANCE[precision]
        assert row.measure == ("largest" if row.output.startswith("batched") else "rms")


@pytest.mark.parametrize(("flavour", "precision"), CASES)
def test_what_graphs_pass_to_each_other_is_half_and_the_rest_is_not(
    export: Export, flavour: str, precision: str
) -> None:
    report = export(VARIANTS[0], flavour, precision)
    half = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    kept = dict.fromkeys(("hash_embedding", "hash_tables", "entropy", "logits"), "float32")
    for name, spec in report.manifest.spec.graphs.items():
        for tensor in (*spec.inputs, *spec.outputs):
            assert tensor.dtype == kept.get(tensor.name, tensor.dtype if tensor.dtype == "int64" else half)
        for path in report.path.glob(f"{name}*.onnx"):
            graph = ir.load(path).graph
            assert all(value.dtype is not ir.DataType.FLOAT or value.name in kept for value in graph.inputs)
            weights = [value for value in graph.initializers.values() if value.const_value is not None]
            large = [value for value in weights if np.prod(value.shape.numpy()) > 8 and value.dtype.is_floating_point()]  # type: ignore[union-attr]
            assert large
            assert {value.dtype.name.lower() for value in large} == {half}  # type: ignore[union-attr]
    weights_of = [path.stat().st_size for path in report.path.glob("*.weights")]
    floats = [path.stat().st_size for path in export(VARIANTS[0], flavour, "fp16").path.glob("*.weights")]
    assert sum(weights_of) == sum(floats)


def test_float16_kernels_compute_what_the_emulation_computes(export: Export, tmp_path: Path) -> None:
    """Within one rounding of the largest value, in the encoder: the other graphs read what it computes."""
    report = export(VARIANTS[0], "cuda", "fp16")
    spec = report.manifest.spec.graphs["encoder"]
    floats = prepare(VARIANTS[0], "cuda").spec.graphs["encoder"]
    path = write_graph(emulate.run(ir.load(report.path / "encoder.onnx")), tmp_path, "encoder")
    rng = np.random.default_rng(0)
    real, emulated = GraphRun(report.path / "encoder.onnx", spec), GraphRun(path, floats)
    for start, end in ((0, 1), (1, 20), (20, 21)):
        n = end - start
        given: dict[str, np.ndarray] = {
            "ids": rng.integers(4, 260, (1, n)),
            "positions": np.arange(start, end)[None],
            "doc_start": np.zeros((1, n), np.int64),
            "hash_embedding": rng.normal(0, 0.1, (1, n, report.manifest.spec.hash.dim)).astype(np.float32),  # type: ignore[union-attr]
        }
        got, want = real(given)["byte_states"], emulated(given)["byte_states"]
        assert got.dtype == np.float16
        assert want.dtype == np.float32
        np.testing.assert_array_equal(want, want.astype(np.float16))  # rounded to half
        assert np.abs(got.astype(np.float32) - want).max() <= 4 * 2.0**-11 * np.abs(want).max()


def test_streams_of_float16_are_resident_or_not_the_same(export: Export) -> None:
    report = export(VARIANTS[0], "cuda", "fp16")
    bundle = Bundle.open(report.path)
    streams = []
    for resident in (False, True):
        backend = OnnxBackend(bundle, resident=resident)
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
        stream.append("Grüße\naus 東京 " * 5)
        stream.append_ids([EOS])
        kept = stream.snapshot()
        first = list(stream.generate_ids(20, temperature=0.0, stop_at_eos=False))
        stream.restore(kept)
        assert list(stream.generate_ids(20, temperature=0.0, stop_at_eos=False)) == first
        streams.append(stream)
    np.testing.assert_array_equal(streams[0].ids, streams[1].ids)
    np.testing.assert_array_equal(streams[0].logits, streams[1].logits)


def test_bfloat16_is_refused_on_a_cpu_when_it_is_opened(export: Export) -> None:
    with pytest.raises(BackendError, match="is of bf16, which has no kernels on CPUs"):
        Model.open(export(VARIANTS[1], "portable", "bf16").path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_evaluated_in_bfloat16(tmp_path: Path, variant: str) -> None:
    """With hash tables and without."""
    ids = np.arange(4, 120)
    ids[0] = 1
    report = pipeline.run(prepare(variant, "cuda", precision="bf16", eval_ids=[ids]), tmp_path / "b")
    judged = report.manifest.judged
    assert judged is not None
    assert 0 < abs(judged.bits_per_byte - judged.float_bits_per_byte) < 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_the_export_prints_how_many_entropies_are_near_the_threshold(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {p: export(VARIANTS[0], "cuda", p) for p in ("fp16", "bf16")}
    assert 0 < found["fp16"].margin < found["bf16"].margin
    assert len(found["fp16"].near_threshold) <= len(found["bf16"].near_threshold)
    report = replace(found["bf16"], near_threshold=(3, 5), margin=0.0123)
    monkeypatch.setattr(blt_export, "export", lambda *_, **__: report)
    save(tmp_path / "model.pt", tiny(VARIANTS[0]))
    assert cli(["export", str(tmp_path / "model.pt"), "-o", str(tmp_path / "b"), "-q"]) == 0
    checked = next(row.positions for row in report.parity if row.output == "entropy.entropy")
    assert f"2 of {checked:,} entropies are within 1.2e-02, twice the largest error," in capsys.readouterr().out
    near = {"entropies": 2, "of": checked, "margin": 0.0123}
    assert report.to_json()["near_threshold"] == near
    assert replace(report, margin=0.0).to_json()["near_threshold"] is None


@pytest.mark.parametrize(("lost", "new", "warning"), [(1, 1, ""), (2, 1, "0.30 % of the patch boundaries move")])
def test_a_warning_tells_that_boundaries_move(
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lost: int,
    new: int,
    warning: str,
) -> None:
    """Above 0.2 % of those of the text."""
    report = export(VARIANTS[0], "cuda", "fp16")
    state = prepare(VARIANTS[0], "cuda", precision="fp16", eval_ids=[np.arange(9)])
    state.folder, state.manifest = report.path, report.manifest
    judged = Judged(9, 2.0, 2.0, boundaries=1000, boundaries_lost=lost, boundaries_new=new)
    monkeypatch.setattr(text, "evaluate", lambda *_: judged)
    caplog.clear()
    steps.evaluate_on_text(state)
    assert state.manifest.judged == judged
    assert (warning in caplog.text) if warning else not caplog.records


def test_graphs_that_pass_vectors_to_each_other_have_one_precision() -> None:
    spec = prepare(VARIANTS[0], "cuda").spec
    with pytest.raises(UsageError, match="give all three the same precision"):
        half_spec(spec, {"encoder": "fp16", "latent": "bf16", "decoder": "fp16"})
    entropy = half_spec(spec, {"entropy": "fp16", "encoder": "fp32", "latent": "fp32", "decoder": "fp32"}).graphs
    assert entropy["entropy"].tensor("past_key.0").dtype == "float16"
    assert entropy["latent"] == spec.graphs["latent"]


def test_bfloat16_in_the_flavour_of_cpus_is_refused() -> None:
    with pytest.raises(UsageError, match="bf16 runs on GPUs"):
        pipeline.export(tiny(VARIANTS[1]), "unused", precision="bf16")

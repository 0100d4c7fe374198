"""A model with more float32 noise than the tolerance is exported; an error of a graph still fails, and the message
says which of both it is."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from blt.checkpoint.models import Checkpoint
from blt.model import BLT, BLTConfig
from blt.model.steps import make_steps
from blt_export import bundle as bundles
from blt_export import pipeline
from blt_export.state import ExportState
from blt_export.verify import batched, errors, parity
from blt_export.verify.plan import make_plan
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import Parity
from blt_runtime.errors import CheckFailed
from blt_runtime.patching import PatchRule


def noisy(scale: float) -> Checkpoint:
    """Three encoder layers whose matrices are `scale` times their initial size."""
    stack = {"dim": 16, "n_layers": 1, "n_heads": 1, "ffn_dim": 8, "max_seqlen": 640}
    blt = BLT(
        BLTConfig.model_validate({"encoder": stack | {"n_layers": 3}, "latent": stack, "decoder": stack, "cross_k": 1})
    )
    blt.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in blt.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return Checkpoint(blt.eval(), None, PatchRule("byte"))


@pytest.fixture(scope="module")
def captured() -> dict[tuple[float, str], ExportState]:
    return {}


def prepared(captured: dict[tuple[float, str], ExportState], scale: float, flavour: str) -> ExportState:
    """An export of `noisy(scale)`; both flavours share its captured graphs."""
    checkpoint = noisy(scale)
    state = pipeline.prepare(checkpoint, flavour, capacity=450, chunk=32)
    first = captured.setdefault((scale, "any"), state)
    state.captured = first.captured
    return state


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_the_tolerance_follows_the_models_own_noise(
    captured: dict[tuple[float, str], ExportState], flavour: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "blt_export"):
        report = pipeline.run(prepared(captured, 3.0, flavour), tmp_path / "b")
    row = next(row for row in report.parity if row.output == "encoder.byte_states")
    assert errors.TOLERANCE["fp32"] < row.error <= row.tolerance < parity.NOISES * parity.LARGEST_NOISE
    assert "encoder.byte_states differs by" in caplog.text
    assert "this model's own float32 noise is" in caplog.text
    assert next(row for row in report.parity if row.output == "decoder.logits").tolerance == errors.TOLERANCE["fp32"]


def test_an_error_of_the_graph_fails_in_a_noisy_model_too(
    captured: dict[tuple[float, str], ExportState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix of the written graph is wrong by one percent."""
    write = bundles.write_graph

    def wrong(model: ir.Model, folder: Path, name: str) -> Path:
        if name == "encoder":
            weight = next(v for v in model.graph.initializers.values() if "feed_forward.w2" in str(v.name))
            assert weight.const_value is not None
            weight.const_value = ir.tensor((weight.const_value.numpy() * np.float32(1.01)).copy(), name=weight.name)
        return write(model, folder, name)

    monkeypatch.setattr("blt_export.bundle.write_graph", wrong)
    with pytest.raises(CheckFailed, match=r"encoder\.byte_states differs .*the graph is wrong, since .* noise is only"):
        pipeline.run(prepared(captured, 3.0, "ort"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_small_error_of_a_quiet_model_fails_as_before(tmp_path: Path) -> None:
    row = Parity("encoder.byte_states", 3e-5, 2e-5, 9)
    assert parity.following(row, 1e-7) == row
    with pytest.raises(CheckFailed, match="the graph is wrong"):
        parity.demand([row], noises={row.output: 1e-7})
    with pytest.raises(CheckFailed, match=r"tolerance 2e-05\); no bundle"):
        parity.demand([row])


def test_the_tolerance_is_bounded() -> None:
    row = Parity("encoder.byte_states", 3e-3, 2e-5, 9)
    assert parity.following(row, 1e-3) == row
    with pytest.raises(CheckFailed, match="too large to tell an error of the graph from it"):
        parity.demand([row], noises={row.output: 1e-3})
    assert parity.following(row, parity.LARGEST_NOISE).tolerance == parity.NOISES * parity.LARGEST_NOISE


def test_the_noise_is_that_of_float32_against_float64(captured: dict[tuple[float, str], ExportState]) -> None:
    checkpoint = noisy(3.0)
    state = prepared(captured, 3.0, "ort")
    steps, plan = make_steps(checkpoint.require_blt()[0], None, 450, 450), make_plan(state.spec)
    inputs = parity._row_inputs(checkpoint, state.spec, plan)["encoder"]
    graph = state.spec.graphs["encoder"]
    want = parity._reference(steps["encoder"], graph, inputs)
    (noise,) = parity._noise(steps["encoder"], graph, inputs, want).values()
    assert 2e-5 < noise < parity.LARGEST_NOISE
    quiet = make_steps(noisy(1.0).require_blt()[0], None, 450, 450)["encoder"]
    (small,) = parity._noise(quiet, graph, inputs, parity._reference(quiet, graph, inputs)).values()
    assert 0 < small < 5e-6
    assert next(steps["encoder"].parameters()).dtype == torch.float32  # the modules are unchanged


def test_batched_graphs_follow_the_noise_of_single_streams(
    captured: dict[tuple[float, str], ExportState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tolerance of zero every difference is above it, and the noise of calls of other sizes decides."""
    state = prepared(captured, 3.0, "ort")
    pipeline.run(state, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    monkeypatch.setattr(batched, "TOLERANCE", {"fp32": 1e-12})
    (row,) = batched.check(bundle)
    assert 1e-12 < row.error <= row.tolerance < 1e-3
    rows = batched._rows
    monkeypatch.setattr(batched, "_rows", lambda *given: (rows(*given)[0] * np.float32(1.01), None))
    with pytest.raises(CheckFailed, match=r"differs from single streams .*the graph is wrong"):
        batched.check(bundle)

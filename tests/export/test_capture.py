"""Capture: bare operators, dynamic sizes, weights under their own names."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter import _registration

from blt_export import steps
from blt_export.capture import trace, translate
from blt_export.rewrite import dims, op_counts
from tests.export.attend import RING, WINDOW, Attend
from tests.export.variants import VARIANTS, Prepare


def test_operators_stay_bare_and_sizes_stay_symbolic() -> None:
    model = trace.capture(Attend(WINDOW, 8), RING)
    counts = op_counts(model)
    assert counts["blt.CachedAttention"] == counts["blt.RMSNorm"] == 1
    assert counts["blt.Rope"] == 2
    batch, step, *_ = dims(model.graph.inputs[0]) or []
    assert isinstance(batch, str)
    assert isinstance(step, str)
    assert batch != step
    assert {"weight", "cos", "sin"} <= set(model.graph.initializers)


def test_an_operator_without_translation_is_decomposed(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = prepare(VARIANTS[0], "ort")
    table = {op: fn for op, fn in translate.translation_table().items() if op is not torch.ops.aten.to.dtype}
    monkeypatch.setattr(trace, "translation_table", lambda: table)
    steps.make_modules(state)
    with caplog.at_level(logging.DEBUG, logger="blt_export"):
        model = trace.capture(state.modules["entropy"], state.spec.graphs["entropy"])
    assert "decomposing first" in caplog.text
    assert op_counts(model)["blt.CachedAttention"] == 2


def test_the_exporters_translations_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = vars(_registration)["onnxscript_apis"]
    reads: list[list[Any]] = []
    read = library.get_torchlib_ops

    def counted() -> list[Any]:
        reads.append(read())
        return reads[-1]

    monkeypatch.setattr(library, "get_torchlib_ops", counted)
    counts = [op_counts(trace.capture(Attend(WINDOW, 8), RING)) for _ in range(2)]
    assert len(reads) == 1
    assert counts[0] == counts[1]
    assert library.get_torchlib_ops is counted

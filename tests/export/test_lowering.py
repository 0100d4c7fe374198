"""Each lowering of cached attention, rotary embedding and norm against the operators' eager semantics.

One small module with nothing else in it runs call after call: single tokens and chunks, rings that wrap, documents that
begin inside the row, rows of a batch at different positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from blt_export.capture import trace
from blt_export.lower import ort, portable
from blt_export.passes import cleanup, fix_capacity, fold_constants, name_io
from blt_export.rewrite import op_counts
from blt_export.verify.parity import GraphRun
from blt_runtime.bundle.spec import GraphSpec
from tests.export.attend import (
    EVICTING,
    GROUPS,
    HEADS,
    LINEAR,
    LINEAR_WINDOW,
    RING,
    ROWS,
    SIZE,
    WINDOW,
    Attend,
    spec_of,
)
from tests.export.variants import BundleOf

LOWER = {"portable": portable.lower, "ort": ort.lower}
TOLERANCE = 5e-6


@cache
def captured(window: int, size: int) -> tuple[Attend, ir.Model]:
    module = Attend(window, size)
    return module, trace.capture(module, spec_of("linear", ROWS, window, size))


@dataclass
class Case:
    flavour: str
    spec: GraphSpec
    window: int
    size: int = SIZE

    def lowered(self) -> ir.Model:
        model = captured(self.window, self.size)[1].clone()
        name_io.run(model, self.spec)
        fix_capacity.run(model, self.spec)
        fold_constants.run(model)
        LOWER[self.flavour](model, self.spec)
        cleanup.run(model)
        return model

    def check(self, folder: Path, start_BN: np.ndarray, positions_BN: np.ndarray, calls: list[int]) -> None:
        """Run the calls against eager attention with a cache that holds everything; assert they agree throughout."""
        path = folder / "attend.onnx"
        ir.save(self.lowered(), path)
        rows = start_BN.shape[0]
        run, module = GraphRun(path, self.spec, rows), captured(self.window, self.size)[0]
        past = [torch.zeros(rows, GROUPS, ROWS, self.size) for _ in range(2)]
        rng = np.random.default_rng(0)
        at = 0
        for count in calls:
            part = slice(at, at + count)
            x = rng.standard_normal((rows, count, HEADS + 2 * GROUPS, self.size), np.float32)
            place = {"positions": positions_BN[:, part].copy(), "doc_start": start_BN[:, part].copy()}
            with torch.no_grad():
                out, *past = module(*map(torch.from_numpy, (x, *place.values())), *past)
            got = run({"x": x, **place})["out"]
            np.testing.assert_allclose(got, out.numpy(), atol=TOLERANCE, err_msg=f"call at {at} of {count}")
            at += count
        assert at == start_BN.shape[1]


def starts(n: int, *documents: int) -> np.ndarray:
    """doc_start of a row whose documents begin at 0 and at `documents`."""
    start = np.zeros(n, np.int64)
    for document in documents:
        start[document:] = document
    return start


CASES = [
    pytest.param(Case("portable", RING, WINDOW), [7, 64, 113], [7, 1, 1, 3, 36, 16, 1, 48, 15, *[1] * 130], id="ring"),
    pytest.param(Case("portable", LINEAR, 0), [40], [1, 1, 37, 1, 60, *[1] * 50], id="portable-linear"),
    pytest.param(Case("ort", EVICTING, WINDOW), [7, 64, 113], [7, 1, 1, 40, 15, 1, 30, 18, *[1] * 140], id="evicting"),
    pytest.param(Case("ort", LINEAR, 0), [40], [1, 1, 38, 1, 60, *[1] * 50], id="ort-linear"),
    pytest.param(Case("ort", LINEAR_WINDOW, WINDOW), [40], [1, 1, 38, 1, 60, *[1] * 50], id="ort-linear-window"),
]


@pytest.mark.parametrize(("case", "documents", "calls"), CASES)
def test_agrees_with_eager_over_many_calls(case: Case, documents: list[int], calls: list[int], tmp_path: Path) -> None:
    n = sum(calls)
    case.check(tmp_path, starts(n, *documents)[None], np.arange(n)[None], calls)


@pytest.mark.parametrize(
    "case", [Case("portable", RING, WINDOW), Case("ort", EVICTING, WINDOW), Case("ort", LINEAR, 0)]
)
def test_rows_of_a_batch_may_begin_documents_at_different_places(case: Case, tmp_path: Path) -> None:
    start = np.stack([starts(120, 9, 70), starts(120, 31), starts(120)])
    case.check(tmp_path, start, np.tile(np.arange(120), (3, 1)), [1] * 120)


def test_heads_that_grouped_query_attention_does_not_support_get_the_portable_lowering(tmp_path: Path) -> None:
    case = Case("ort", spec_of("ring", 64, WINDOW, 4), WINDOW, size=4)
    counts = op_counts(case.lowered())
    assert counts["com.microsoft.GroupQueryAttention"] == 0
    assert counts["TensorScatter"] == 2
    case.check(tmp_path, starts(100, 30)[None], np.arange(100)[None], [1] * 40 + [24] + [1] * 36)


def test_ort_packs_heads_without_transposing(bundle_of: BundleOf) -> None:
    report = bundle_of("all_layers_gqa_projection", "ort")
    for name in ("entropy", "encoder"):
        counts = op_counts(ir.load(report.path / f"{name}.onnx"))
        assert counts["com.microsoft.GroupQueryAttention"] == 2
        assert counts["Transpose"] == 0


def test_the_mask_is_computed_once_a_graph(bundle_of: BundleOf) -> None:
    counts = op_counts(ir.load(bundle_of("all_layers_gqa_projection", "portable").path / "entropy.onnx"))
    assert counts["Attention"] == 2
    assert counts["LessOrEqual"] == counts["GreaterOrEqual"] == 1
    assert counts["Gather"] == 5  # bytes, two rotary tables, first and last position

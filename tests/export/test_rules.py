"""Rewrite rules: what applies is rewritten, and why another node was skipped is in the log."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from blt_export.passes import cleanup, join_products, pack_heads, rotate_inside, simplify_gathers
from blt_export.rewrite import op_counts
from blt_export.rules import GRAPH
from tests.export.small_graphs import INT, F, finish, model_of, rotated, run, value, weight


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if " skips " in record.getMessage()]


def test_each_reason_is_logged_once_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    model, b = model_of([value("x", "B", 4), value("index", "B", 1, dtype=INT)])
    x, index = model.graph.inputs
    batched = b.op("Unsqueeze", index, b.const([-1]), dtype=INT, shape=["B", 1, 1])
    outputs = [b.op("GatherND", x, batched, dtype=F, shape=["B", 1], batch_dims=1) for _ in range(3)]
    outputs.append(b.op("GatherND", x, index, dtype=F, shape=["B", 4]))
    finish(model, *outputs)
    model.meta[GRAPH] = "decoder"
    with caplog.at_level(logging.DEBUG, logger="blt_export"):
        assert simplify_gathers.run(model) == 0
    counted, other = _lines(caplog)
    assert counted.startswith("decoder: GatherRows skips GatherND ")
    assert counted.endswith(" and 2 more: batch_dims is not 0")
    assert "GatherRows skips GatherND" in other


def test_heads_of_another_size_are_the_reason_that_rotation_stays_outside(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = rotated(True, 8)
    with caplog.at_level(logging.DEBUG, logger="blt_export"):
        assert rotate_inside.run(model) == 0
    assert "RotateInside skips com.microsoft.GroupQueryAttention" in caplog.text
    assert "heads of 8, no multiple of 16" in caplog.text


def test_nodes_that_a_rule_made_are_not_its_candidates(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = rotated(True, 16)
    with caplog.at_level(logging.DEBUG, logger="blt_export"):
        assert rotate_inside.run(model) == 1
    assert _lines(caplog) == []


def test_products_that_stay_apart_are_logged_the_same_way(caplog: pytest.LogCaptureFixture) -> None:
    model, b = model_of([value("x", "S", 6)])
    x = model.graph.inputs[0]
    y = b.op("MatMul", x, weight(model, "odd", np.ones((6, 4), np.float32)), dtype=F, shape=["S", 4])
    z = b.op("MatMul", y, weight(model, "even", np.ones((4, 4), np.float32)), dtype=F, shape=["S", 4])
    finish(model, z)
    with caplog.at_level(logging.DEBUG, logger="blt_export"):
        assert join_products.run(model, block=4) == 0
    assert "6 inputs, no multiple of 4: the matrix stays float32" in caplog.text
    assert "no other product reads the same values" in caplog.text


@pytest.mark.parametrize("rotated", [False, True])
def test_heads_stay_packed(rotated: bool) -> None:
    """[B, S, H*K] split, rotated and packed again: the rotation of the packed form, or nothing."""
    heads, size = 2, 4
    model, b = model_of([value("x", "B", "S", heads * size), value("cos", "B", "S", size // 2),
                         value("sin", "B", "S", size // 2)])  # fmt: skip
    x, cos, sin = model.graph.inputs
    split_shape: list[int | str] = ["B", heads, "S", size]
    split = b.op("Reshape", x, b.const([0, 0, heads, size]), dtype=F, shape=["B", "S", heads, size])
    swapped = b.op("Transpose", split, dtype=F, shape=split_shape, perm=[0, 2, 1, 3])
    if rotated:
        swapped = b.op("RotaryEmbedding", swapped, cos, sin, dtype=F, shape=split_shape, interleaved=1)
    back = b.op("Transpose", swapped, dtype=F, shape=["B", "S", heads, size], perm=[0, 2, 1, 3])
    packed = b.op("Reshape", back, b.const([0, 0, heads * size]), dtype=F, shape=["B", "S", heads * size])
    finish(model, b.op("Neg", packed, dtype=F, shape=["B", "S", heads * size]))
    changed = model.clone()
    assert pack_heads.run(changed) == 1 + rotated
    cleanup.run(changed)
    assert op_counts(changed) == ({"RotaryEmbedding": 1, "Neg": 1} if rotated else {"Neg": 1})
    rng = np.random.default_rng(0)
    given = {"x": rng.normal(size=(2, 3, 8)), "cos": rng.normal(size=(2, 3, 2)), "sin": rng.normal(size=(2, 3, 2))}
    call = {name: array.astype(np.float32) for name, array in given.items()}
    np.testing.assert_array_equal(run(changed, **call)[0], run(model, **call)[0])


def test_heads_that_another_node_reads_are_not_packed() -> None:
    model, b = model_of([value("x", "B", "S", 8)])
    split = b.op("Reshape", model.graph.inputs[0], b.const([0, 0, 2, 4]), dtype=F, shape=["B", "S", 2, 4])
    swapped = b.op("Transpose", split, dtype=F, shape=["B", 2, "S", 4], perm=[0, 2, 1, 3])
    wide = b.op("Reshape", swapped, b.const([0, 0, -1]), dtype=F, shape=["B", 2, "W"])
    finish(model, wide)
    assert pack_heads.run(model) == 0
    assert op_counts(model) == {"Reshape": 2, "Transpose": 1}

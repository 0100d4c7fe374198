"""The fusions of the flavour `ort`, one test each: fewer nodes, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from blt_export.passes import cleanup, join_products, read_slices, rotate_inside
from blt_export.rewrite import Builder, op_counts
from tests.export.small_graphs import CONTRIB, INT, F, finish, model_of, rotated, run, value, weight

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_products_of_the_same_values_become_one() -> None:
    model, b = model_of([value("x", "S", 4), value("y", "S", 4)])
    x, y = model.graph.inputs
    matrices = [floats(4, n) for n in (2, 4, 1)]
    weights = [weight(model, f"w{i}", m) for i, m in enumerate(matrices)]
    products = [b.op("MatMul", x, w, dtype=F, shape=["S", n]) for w, n in zip(weights, (2, 4, 1), strict=True)]
    other = b.op("MatMul", y, weights[0], dtype=F, shape=["S", 2])
    inner = b.op("MatMul", x, b.op("Transpose", y, dtype=F, shape=[4, "S"]), dtype=F, shape=["S", "S"])
    finish(model, *(b.op("Relu", p, dtype=F, shape=p.shape) for p in products), other, inner)
    given = {name: floats(5, 4) for name in ("x", "y")}
    assert join_products.run(model, block=8) == 0  # 4 inputs are no multiple of 8: the matrices will stay float32
    assert join_products.run(model, block=2) == 2
    cleanup.run(model)
    assert op_counts(model)["MatMul"] == 3  # joined, of other values, of no constant
    assert op_counts(model)["Split"] == 1
    got = run(model, **given)
    for result, matrix in zip(got, matrices, strict=False):
        np.testing.assert_allclose(result, np.maximum(given["x"] @ matrix, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[3], given["y"] @ matrices[0], rtol=1e-6, atol=1e-6)
    assert join_products.run(model, block=2) == 0


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_rotation_moves_into_the_attention(packed: bool, size: int) -> None:
    model, node = rotated(packed, size)
    changed = model.clone()
    assert rotate_inside.run(changed) == (size % 16 == 0)
    cleanup.run(changed)
    counts = op_counts(changed)
    if size % 16:
        assert counts["RotaryEmbedding"] == 2
        return
    assert counts == {f"{CONTRIB}.{node}": 1} | ({} if packed else {"Split": 1, "Neg": 1})
    cache = np.zeros((1, 2, 32, size), np.float32)
    caches = [{"key": cache, "value": cache.copy()} for _ in range(2)]
    first = 300  # positions continue where the cache starts over
    for at, count in ((0, 3), (3, 1), (4, 5)):
        call = {
            "qkv": floats(1, count, 8 * size),
            "positions": np.arange(first + at, first + at + count)[None],
            "last": np.array([at + count - 1], np.int32),
            "total": np.array(at + count, np.int32),
        }
        results = [run(m, **call, **held) for m, held in zip((model, changed), caches, strict=True)]
        for want, got in zip(*results, strict=True):
            np.testing.assert_array_equal(got, want)
        caches = [{"key": result[1], "value": result[2]} for result in results]


@pytest.mark.parametrize("masked", [False, True])
def test_each_layer_reads_the_slices_by_one_attention(masked: bool) -> None:
    model, slices, heads, size = _slices(masked)
    changed = model.clone()
    assert read_slices.run(changed) == (0 if masked else 2)
    cleanup.run(changed)
    counts = op_counts(changed)
    assert counts["Attention"] == (0 if masked else 2)
    if not masked:
        assert counts == {"Gather": 1, "Attention": 2, "Split": 1, "Shape": 1, "Reshape": 4}
    width = heads * size
    for rows, count in ((1, 1), (2, 5)):
        call = {
            "q": floats(rows, count, heads, size),
            "pool": floats(7, 2, 2, slices, width),
            "row": RNG.integers(0, 7, (rows, count, 1)),
        }
        for want, got in zip(run(model, **call), run(changed, **call), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def _slices(masked: bool) -> tuple[ir.Model, int, int, int]:
    """Two layers that read the slices of one patch, as captured and cleaned."""
    slices, heads, size = 3, 2, 4
    width = heads * size
    shape: list[int | str] = ["B", "S", slices, heads, size]
    model, b = model_of([value("q", "B", "S", heads, size), value("pool", "R", 2, 2, slices, width),
                         value("row", "B", "S", 1, dtype=INT)])  # fmt: skip
    q, pool, row = model.graph.inputs
    taken = b.op("Gather", pool, row, axis=0, dtype=F, shape=["B", "S", 1, 2, 2, slices, width])
    outputs = []
    for layer in range(2):
        both = b.op("Gather", taken, b.const(layer), axis=3)
        k, v = (_heads(b, b.op("Gather", both, b.const(kind), axis=3), shape) for kind in range(2))
        product = b.op("Mul", b.op("Unsqueeze", q, b.const([2])), k, dtype=F, shape=shape)
        score = b.op("Mul", _sum(b, product, -1), b.const(0.5, np.float32), dtype=F, shape=shape[:4])
        if masked:
            score = b.op("Where", b.op("IsNaN", score), b.const(0.0, np.float32), score)
        share = b.op("Softmax", score, axis=2)
        weighted = b.op("Mul", b.op("Unsqueeze", share, b.const([-1])), v, dtype=F, shape=shape)
        outputs.append(_sum(b, weighted, 2))
        outputs[-1].dtype, outputs[-1].shape = F, ir.Shape(["B", "S", heads, size])
    finish(model, *outputs)
    return model, slices, heads, size


def _heads(b: Builder, x: ir.Value, shape: list[int | str]) -> ir.Value:
    split: ir.Value = b.op("Reshape", x, b.const([0, 0, *shape[2:]]), dtype=F, shape=shape)
    return split


def _sum(b: Builder, x: ir.Value, axis: int) -> ir.Value:
    total: ir.Value = b.op("ReduceSum", x, b.const([axis]), keepdims=0)
    return total

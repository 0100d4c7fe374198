"""The fusions of the flavour `ort`, one test each: fewer nodes, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from blt_export.passes import cleanup, fold_doubling, join_products, read_slices, rotate_inside
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


def _slices(masked: bool, *, projected: bool = False) -> tuple[ir.Model, int, int, int]:
    """Two layers that read the slices of one patch, as captured and cleaned. projected: q is [B, S, D], and so are the
    outputs."""
    slices, heads, size = 3, 2, 4
    width = heads * size
    shape: list[int | str] = ["B", "S", slices, heads, size]
    of_q: list[int | str] = ["B", "S", width] if projected else ["B", "S", heads, size]
    model, b = model_of([value("q", *of_q), value("pool", "R", 2, 2, slices, width),
                         value("row", "B", "S", 1, dtype=INT)])  # fmt: skip
    q, pool, row = model.graph.inputs
    if projected:
        q = b.op("Reshape", q, b.const([0, 0, heads, size]), dtype=F, shape=["B", "S", heads, size])
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
        if projected:
            outputs[-1] = b.op("Reshape", outputs[-1], b.const([0, 0, width]), dtype=F, shape=["B", "S", width])
    finish(model, *outputs)
    return model, slices, heads, size


def _heads(b: Builder, x: ir.Value, shape: list[int | str]) -> ir.Value:
    split: ir.Value = b.op("Reshape", x, b.const([0, 0, *shape[2:]]), dtype=F, shape=shape)
    return split


def _sum(b: Builder, x: ir.Value, axis: int) -> ir.Value:
    total: ir.Value = b.op("ReduceSum", x, b.const([axis]), keepdims=0)
    return total


def _attention(size: int, *, rotated: int = 2) -> ir.Model:
    """x [B, S, 8] projected to queries of two heads and keys and values of one, and a pair of products without an
    attention. rotated: of queries and keys."""
    int32 = ir.DataType.INT32
    cache: list[int | str] = ["B", 1, 32, size]
    model, b = model_of([value("x", "B", "S", 8), value("positions", "B", "S", dtype=INT),
                         value("last", "B", dtype=int32), value("total", dtype=int32),
                         value("key", *cache), value("value", *cache)])  # fmt: skip
    model.graph.opset_imports[CONTRIB] = 1
    x, positions, last, total, key, held = model.graph.inputs
    tables = [weight(model, n, floats(64, size // 2)) for n in ("cos", "sin")]
    rows = [b.op("Gather", table, positions, axis=0) for table in tables]
    widths = {"q": 2 * size, "k": size, "v": size, "gate": 4, "up": 4}
    made = {
        n: b.op("MatMul", x, weight(model, n, floats(8, width)), dtype=F, shape=["B", "S", width])
        for n, width in widths.items()
    }
    for name, heads in list({"q": 2, "k": 1}.items())[:rotated]:
        made[name] = b.op("RotaryEmbedding", made[name], *rows, interleaved=1, num_heads=heads)
    outputs = b.op("GroupQueryAttention", *(made[n] for n in "qkv"), key, held, last, total, domain=CONTRIB, outputs=3,
                   num_heads=2, kv_num_heads=1, do_rotary=0)  # fmt: skip
    shapes: list[list[int | str]] = [["B", "S", 2 * size], cache, cache]
    for output, shape in zip(outputs, shapes, strict=True):
        output.dtype, output.shape = F, ir.Shape(shape)
    finish(model, *outputs, b.op("Mul", made["gate"], made["up"], dtype=F, shape=["B", "S", 4]))
    return model


def test_in_float32_only_the_products_of_an_attention_become_one() -> None:
    model = _attention(16)
    changed = model.clone()
    for node in list(changed.graph):  # the two products without an attention read other values
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].name in ("gate", "up"):
            node.replace_input_with(0, Builder(changed.graph, node).op("Neg", changed.graph.inputs[0]))
    model = changed.clone()
    assert join_products.run(changed, attentions_only=True) == 2
    assert rotate_inside.run(changed) == 1
    cleanup.run(changed)
    assert op_counts(changed) == {"Neg": 1, "MatMul": 3, f"{CONTRIB}.GroupQueryAttention": 1, "Mul": 1}
    cache = np.zeros((1, 1, 32, 16), np.float32)
    call = {
        "x": floats(1, 5, 8),
        "positions": np.arange(20, 25)[None],
        "last": np.array([4], np.int32),
        "total": np.array(5, np.int32),
        "key": cache,
        "value": cache,
    }
    for want, got in zip(run(model, **call), run(changed, **call), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "rotated"), [(8, 2), (16, 1)])
def test_products_that_the_attention_would_not_take_in_one_piece_stay(size: int, rotated: int) -> None:
    model = _attention(size, rotated=rotated)
    assert join_products.run(model, attentions_only=True) == 0


def _doubling(layers: int = 2, epsilon: float = 1e-5) -> tuple[ir.Model, Builder, ir.Value]:
    """Layers 2 * h + norm(h) @ a, then h + norm(h) @ b, as captured: the last h, not an output yet."""
    model, b = model_of([value("h", "S", 8)])
    h = model.graph.inputs[0]

    def normed(x: ir.Value, name: str) -> ir.Value:
        gain = weight(model, f"{name}.gain", floats(8))
        norm = b.op("RMSNormalization", x, gain, axis=-1, epsilon=epsilon, dtype=F, shape=["S", 8])
        product: ir.Value = b.op("MatMul", norm, weight(model, name, floats(8, 8)), dtype=F, shape=["S", 8])
        return product

    for layer in range(layers):
        c = normed(h, f"a{layer}")
        h = b.op("Add", b.op("Mul", h, b.const(2.0, np.float32), dtype=F, shape=["S", 8]), c, dtype=F, shape=["S", 8])
        h = b.op("Add", h, normed(h, f"b{layer}"), dtype=F, shape=["S", 8])
    return model, b, h


@pytest.mark.parametrize("layers", [1, 4])
def test_doublings_move_into_weights_and_no_bit_changes(layers: int) -> None:
    model, b, h = _doubling(layers)
    norm = b.op("RMSNormalization", h, weight(model, "gain", floats(8)), axis=-1, epsilon=1e-5, dtype=F, shape=["S", 8])
    finish(model, norm)
    changed = model.clone()
    assert fold_doubling.run(changed) == layers
    cleanup.run(changed)
    assert op_counts(changed) == {"RMSNormalization": 2 * layers + 1, "MatMul": 2 * layers, "Add": 2 * layers}
    for scale in (1e-4, 1.0, 1e3):
        h_SD = scale * floats(6, 8)
        np.testing.assert_array_equal(run(changed, h=h_SD)[0], run(model, h=h_SD)[0])
    assert fold_doubling.run(changed) == 0


@pytest.mark.parametrize("end", ["output", "other reader", "no product", "epsilon", "no constant"])
def test_doublings_stay_where_something_else_reads_the_sum(end: str) -> None:
    model, b, h = _doubling(epsilon=1e-37 if end == "epsilon" else 1e-5)
    if end == "output":
        finish(model, h)
    elif end == "other reader":
        finish(model, b.op("Relu", h, dtype=F, shape=["S", 8]))
    else:
        if end == "no product":
            h = b.op("Add", h, b.op("Neg", model.graph.inputs[0], dtype=F, shape=["S", 8]), dtype=F, shape=["S", 8])
        elif end == "no constant":
            square = b.op("MatMul", b.op("Transpose", model.graph.inputs[0]), model.graph.inputs[0])
            product = b.op("MatMul", model.graph.inputs[0], square, dtype=F, shape=["S", 8])
            h = b.op("Add", h, product, dtype=F, shape=["S", 8])
        gain = weight(model, "gain", floats(8))
        finish(model, b.op("RMSNormalization", h, gain, axis=-1, epsilon=1e-5, dtype=F, shape=["S", 8]))
    before = ir.to_proto(model).SerializeToString()
    assert fold_doubling.run(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_queries_are_reshaped_once_before_and_once_after_the_slices() -> None:
    """From [B, S, D] to rows of one query (here the same in both layers) and back; the attention splits the heads."""
    model, slices, heads, size = _slices(masked=False, projected=True)
    changed = model.clone()
    assert read_slices.run(changed) == 2
    cleanup.run(changed)
    assert op_counts(changed) == {"Gather": 1, "Attention": 2, "Split": 1, "Shape": 1, "Reshape": 4}
    width = heads * size
    for rows, count in ((1, 1), (2, 5)):
        call = {
            "q": floats(rows, count, width),
            "pool": floats(7, 2, 2, slices, width),
            "row": RNG.integers(0, 7, (rows, count, 1)),
        }
        for want, got in zip(run(model, **call), run(changed, **call), strict=True):
            assert got.shape == (rows, count, width)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

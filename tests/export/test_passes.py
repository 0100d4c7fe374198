"""One test per pass, on graphs small enough to read."""

from __future__ import annotations

import numpy as np
import pytest

from blt_export.lower.common import check_lowered
from blt_export.passes import (
    cleanup,
    fix_capacity,
    fold_constants,
    fold_weights,
    gather_once,
    name_io,
    simplify_gathers,
    simplify_reshapes,
)
from blt_export.rewrite import op_counts
from blt_runtime.bundle.spec import DTYPE_BYTES, CacheSpec, GraphSpec, TensorSpec
from tests.export.small_graphs import INT, F, constant, dims, finish, model_of, run, value, weight


def test_name_io_names_everything_as_the_spec() -> None:
    model, b = model_of([value("a", "s0", 4)])
    finish(model, b.op("Relu", model.graph.inputs[0], dtype=F, shape=["s0", 4]))
    spec = GraphSpec("g", (TensorSpec("x", "float32", ("B", 4)),), (TensorSpec("y", "float32", ("B", 4)),), {}, None)
    assert name_io.run(model, spec) == 2
    graph = model.graph
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == ["x", "y"]
    assert str(graph.node(0).outputs[0].shape) == "[B,4]"


def test_name_io_refuses_another_element_type() -> None:
    model, b = model_of([value("a", "s0", dtype=INT)])
    finish(model, b.op("Neg", model.graph.inputs[0], dtype=INT, shape=["s0"]))
    spec = GraphSpec("g", (TensorSpec("x", "float32", ("B",)),), (TensorSpec("y", "int64", ("B",)),), {}, None)
    with pytest.raises(ValueError, match="x has type INT64, but its graph spec has float32"):
        name_io.run(model, spec)


def test_name_io_has_every_type_of_a_spec() -> None:
    assert set(name_io.TYPES) == set(DTYPE_BYTES)


@pytest.mark.parametrize("shape", [("B", 5), ("B", 4, 1), ("B",)])
def test_name_io_refuses_another_rank_or_fixed_size(shape: tuple[int | str, ...]) -> None:
    model, b = model_of([value("a", "s0", 4)])
    finish(model, b.op("Relu", model.graph.inputs[0], dtype=F, shape=["s0", 4]))
    spec = GraphSpec("g", (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),), {}, None)
    with pytest.raises(ValueError, match="x has shape"):
        name_io.run(model, spec)


def test_name_io_leaves_the_capacity_of_caches_to_fix_capacity() -> None:
    model, b = model_of([value("a", "s0", 2, 8, 4)])
    finish(model, b.op("Relu", model.graph.inputs[0], dtype=F, shape=["s0", 2, 8, 4]))
    past, present = (TensorSpec(f"{name}_key.0", "float32", ("B", 2, 640, 4)) for name in ("past", "present"))
    spec = GraphSpec("g", (past,), (present,), {present.name: past.name}, CacheSpec("linear", 640, None, 1))
    assert name_io.run(model, spec) == 2


@pytest.mark.parametrize("second_reader", [False, True])
def test_a_cache_is_read_only_by_its_writer(second_reader: bool) -> None:
    model, b = model_of([value("past", "B", 1, 8, 4), value("new", "B", 1, 1, 4), value("slot", "B", dtype=INT)])
    present = b.op("TensorScatter", *model.graph.inputs, axis=-2, dtype=F, shape=["B", 1, 8, 4])
    present.name = "present"
    other = b.op("Relu", model.graph.inputs[0] if second_reader else present, dtype=F, shape=["B", 1, 8, 4])
    finish(model, other, present)
    shape = ("B", 1, 8, 4)
    inputs = (TensorSpec("past", "float32", shape),)
    outputs = (TensorSpec("present", "float32", shape),)
    spec = GraphSpec("g", inputs, outputs, {"present": "past"}, CacheSpec("linear", 8, None, 1))
    if not second_reader:
        return check_lowered(model, spec)
    with pytest.raises(ValueError, match="past is read by Relu"):
        check_lowered(model, spec)


def test_fix_capacity_sets_both_ends_of_a_cache() -> None:
    model, b = model_of([value("past", "B", 2, 8, 4)])
    output = b.op("Relu", model.graph.inputs[0], dtype=F, shape=["B", 2, 8, 4])
    output.name = "present"
    finish(model, output)
    shape = ("B", 2, 640, 4)
    spec = GraphSpec("g", (TensorSpec("past", "float32", shape),), (TensorSpec("present", "float32", shape),),
                     {"present": "past"}, CacheSpec("linear", 640, None, 1))  # fmt: skip
    assert fix_capacity.run(model, spec) == 2
    assert fix_capacity.run(model, spec) == 0
    assert dims(model.graph.outputs[0]) == ["B", 2, 640, 4]


def test_fold_weights_leaves_no_transposed_constant() -> None:
    model, b = model_of([value("x", "B", 3)])
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    turned = b.op("Transpose", weight(model, "w", w), perm=[1, 0])
    finish(model, b.op("MatMul", model.graph.inputs[0], turned, dtype=F, shape=["B", 4]))
    assert fold_weights.run(model) == 1
    assert op_counts(model) == {"MatMul": 1}
    np.testing.assert_array_equal(constant(model.graph.initializers["w.T"]), w.T)


def test_fold_constants_computes_shape_arithmetic() -> None:
    model, b = model_of([value("x", "B", 6)])
    sizes = b.op("Concat", b.const([-1]), b.op("Mul", b.const([1]), b.const([2])), b.const([3]), axis=0)
    finish(model, b.op("Reshape", model.graph.inputs[0], sizes, dtype=F, shape=["B", 2, 3]))
    assert fold_constants.run(model) == 2
    assert op_counts(model) == {"Reshape": 1}


def test_simplify_gathers() -> None:
    model, b = model_of([value("index", "B", "S", dtype=INT)])
    table = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    rows = b.op("Unsqueeze", model.graph.inputs[0], b.const([-1]), dtype=INT, shape=["B", "S", 1])
    finish(model, b.op("GatherND", weight(model, "t", table), rows, dtype=F, shape=["B", "S", 2], batch_dims=0))
    assert simplify_gathers.run(model) == 1
    cleanup.run(model)
    assert op_counts(model) == {"Gather": 1}
    index = np.array([[4, 0, 2]])
    np.testing.assert_array_equal(run(model, index=index)[0], table[index])


def test_gather_once_reads_the_pool_once() -> None:
    model, b = model_of([value("pool", "R", 2, 2, 3), value("row", "B", "S", dtype=INT)])
    pool, row = model.graph.inputs
    taken = []
    for layer in range(2):
        one = b.op("Gather", pool, b.const(layer), dtype=F, shape=["R", 2, 3], axis=1)
        rows = b.op("Gather", one, row, dtype=F, shape=["B", "S", 2, 3], axis=0)
        cut = b.op("Slice", rows, b.const([1]), b.const([2]), b.const([2]), dtype=F, shape=["B", "S", 1, 3])
        taken.append(b.op("Squeeze", cut, b.const([2]), dtype=F, shape=["B", "S", 3]))
    finish(model, *taken)
    data = np.random.default_rng(0).standard_normal((4, 2, 2, 3)).astype(np.float32)
    index = np.array([[3, 1, 0]])
    before = run(model, pool=data, row=index)
    assert gather_once.run(model) == 4
    cleanup.run(model)
    assert op_counts(model) == {"Gather": 5}
    for old, new in zip(before, run(model, pool=data, row=index), strict=True):
        np.testing.assert_array_equal(old, new)


def test_gather_once_leaves_other_slices_alone() -> None:
    model, b = model_of([value("x", "B", 4)])
    cut = b.op("Slice", model.graph.inputs[0], b.const([-1]), b.const([4]), b.const([1]), dtype=F, shape=["B", 1])
    finish(model, b.op("Squeeze", cut, b.const([1]), dtype=F, shape=["B"]))
    assert gather_once.run(model) == 0


def test_simplify_reshapes_makes_targets_constant_and_merges_chains() -> None:
    model, b = model_of([value("x", "B", "S", 6)])
    x = model.graph.inputs[0]
    target = b.op("Concat", b.op("Shape", x, start=0, end=2), b.const([2, 3]), axis=0)
    first = b.op("Reshape", x, target, dtype=F, shape=["B", "S", 2, 3])
    back = b.op("Concat", b.op("Shape", x, start=0, end=2), b.const([3, 2]), axis=0)
    finish(model, b.op("Reshape", first, back, dtype=F, shape=["B", "S", 3, 2]))
    simplify_reshapes.run(model)
    cleanup.run(model)
    assert op_counts(model) == {"Reshape": 1}
    assert constant(model.graph.node(0).inputs[1]).tolist() == [0, 0, 3, 2]
    x_value = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    np.testing.assert_array_equal(run(model, x=x_value)[0], x_value.reshape(2, 2, 3, 2))


def test_simplify_reshapes_keeps_a_target_with_two_unknown_sizes() -> None:
    model, b = model_of([value("x", "N"), value("shape", 2, dtype=INT)])
    finish(model, b.op("Reshape", *model.graph.inputs, dtype=F, shape=["P", "L"]))
    assert simplify_reshapes.run(model) == 0


def test_cleanup_merges_equal_nodes_and_drops_unused_ones() -> None:
    model, b = model_of([value("x", "B")])
    x = model.graph.inputs[0]
    b.op("Neg", x)
    same = [b.op("Relu", b.op("Identity", x), dtype=F, shape=["B"]) for _ in range(2)]
    finish(model, b.op("Add", *same, dtype=F, shape=["B"]))
    weight(model, "unused", np.ones(3, np.float32))
    assert cleanup.run(model) >= 4
    assert op_counts(model) == {"Relu": 1, "Add": 1}
    assert "unused" not in model.graph.initializers

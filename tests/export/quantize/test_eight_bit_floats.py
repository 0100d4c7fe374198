"""8-bit floats: rounding within its bound, the same numbers as codes and as stored weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from blt_export.quantize import eight_bit_floats
from blt_export.quantize.eight_bit_floats import narrow, widen

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
K, N = 40, 7


def weight(dtype: type = np.float32) -> np.ndarray:
    """Among the outputs are zeros, opposites, a large outlier and small numbers."""
    w_KN = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    w_KN[:, 0] = 0
    w_KN[::2, 1], w_KN[1::2, 1] = -3.0, 3.0
    w_KN[5, 2] = 200.0
    w_KN[:, 3] *= 1e-3
    return w_KN.astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_stays_within_its_bound(dtype: type) -> None:
    """A sixteenth of a weight, or half the smallest step of its output: the largest weight over 448 * 2^10."""
    codes_KN, scale_N = narrow(weight(dtype))
    assert scale_N.dtype == dtype
    assert (scale_N > 0).all()
    got_KN, want_KN = widen(codes_KN, scale_N).astype(np.float32), weight(dtype).astype(np.float32)
    unit = float(ml_dtypes.finfo(dtype).eps)
    bound_KN = np.maximum(np.abs(want_KN) * (2.0**-4 + unit), np.abs(want_KN).max(0) / 448 * 2.0**-10 * (1 + unit))
    assert (np.abs(got_KN - want_KN) <= bound_KN).all()
    assert np.abs(got_KN - want_KN).max() > 0
    np.testing.assert_array_equal(got_KN[:, 0], 0)


def test_the_largest_weight_of_an_output_keeps_its_size() -> None:
    codes_KN, scale_N = narrow(weight())
    largest_N = np.abs(widen(codes_KN, scale_N)).max(0)
    np.testing.assert_allclose(largest_N, np.abs(weight()).max(0), rtol=1e-6)


def model_of(w_KN: np.ndarray, x_RK: np.ndarray) -> ir.Model:
    """y = x W, and z = x V with a V that is computed."""
    kind = ir.DataType.from_numpy(w_KN.dtype)
    w = ir.Value(name="w", type=ir.TensorType(kind), shape=ir.Shape(w_KN.shape), const_value=ir.tensor(w_KN, name="w"))
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(x_RK.shape))
    v = ir.Value(name="v", type=ir.TensorType(kind), shape=ir.Shape(w_KN.shape))
    y, z = ir.node("MatMul", [x, w]), ir.node("MatMul", [x, v])
    for node, name in ((y, "y"), (z, "z")):
        node.outputs[0].name, node.outputs[0].dtype = name, kind
        node.outputs[0].shape = ir.Shape([len(x_RK), w_KN.shape[1]])
    graph = ir.Graph(
        [x, v], [y.outputs[0], z.outputs[0]], nodes=[y, z], initializers=[w], opset_imports={"": 24}, name="g"
    )
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_codes_and_rounded_weights_are_the_same_products(dtype: type) -> None:
    import onnxruntime

    x_RK: np.ndarray = np.random.default_rng(1).standard_normal((3, K)).astype(dtype)
    found = []
    for change in (eight_bit_floats.run, eight_bit_floats.round_weights):
        model = model_of(weight(dtype), x_RK)
        assert change(model) == 1
        assert "w" not in model.graph.initializers
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found.append(session.run(None, {"x": x_RK, "v": weight(dtype)}))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    plain = x_RK.astype(np.float32) @ weight(dtype).astype(np.float32)
    assert np.abs(found[0][0] - plain).max() > 0
    np.testing.assert_allclose(found[0][1].astype(np.float32), plain, rtol=2e-2, atol=0.1)
    stored = {value.dtype for value in model.graph.initializers.values()}
    assert stored == {ir.DataType.from_numpy(np.dtype(dtype))}

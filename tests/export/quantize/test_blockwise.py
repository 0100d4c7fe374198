"""Packed weights: ONNX Runtime's operator reads them, its packer writes the same bits, and wrong blocks are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from blt_export.quantize.blockwise import (
    WHOLE_ROW,
    Blocks,
    Format,
    block_error,
    dequantise,
    from_signed,
    quantise,
    signed,
)

FORMATS = (Format(8, 128), Format(8, 32, zero_points=True), Format(4, 32), Format(4, 32, True), Format(4, 16, True))
SHRUNK = Format(4, 32, shrink=(0.9, 0.8))
HALF = (Format(8, 32, half_scales=True), Format(4, 32, shrink=(0.9, 0.8), half_scales=True))
N, K = 9, 384
STANDARD = (
    Format(8, WHOLE_ROW, half_scales=True, positive=True).of_rows(K),
    HALF[1],
    replace(HALF[1], positive=True),
)


def weight(seed: int = 0) -> np.ndarray:
    """Blocks of zeros, of one sign, of opposites and with an outlier are among them."""
    w_NK = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)
    w_NK[0] = 0
    w_NK[1] = np.abs(w_NK[1]) + 0.5
    w_NK[2, ::2], w_NK[2, 1::2] = -1.0, 1.0
    w_NK[3, ::32] *= 50
    return w_NK


@pytest.mark.parametrize("form", [*FORMATS, SHRUNK, *HALF, *STANDARD])
def test_rounding_stays_within_its_bound(form: Format) -> None:
    error = block_error(dequantise(quantise(weight(), form), form), weight(), form)
    assert 0 < error <= form.largest_error


@pytest.mark.parametrize("form", HALF)
def test_scales_can_be_float16(form: Format) -> None:
    scales = quantise(weight(), form).scales
    np.testing.assert_array_equal(scales, scales.astype(np.float16))


@pytest.mark.parametrize("form", STANDARD)
def test_dequantise_reads_what_the_standard_operator_reads(form: Format) -> None:
    """Also zeros, and weights so small that float16 has no scale for them, of which a positive one is needed."""
    w_NK = weight()
    w_NK[4] *= 1e-10
    blocks = quantise(w_NK, form)
    assert (blocks.scales > 0).all() == form.positive
    np.testing.assert_array_equal(from_signed(signed(blocks, form), blocks.scales, form).codes, blocks.codes)
    kind = {8: TensorProto.INT8, 4: TensorProto.INT4}[form.bits]
    codes = helper.make_tensor("codes", kind, (K, N), signed(blocks, form).T.reshape(-1))
    scales_JN = blocks.scales.T
    options: dict[str, Any] = {"axis": 0, "block_size": form.block}
    if form.bits == 8:
        scales_JN, options = scales_JN[0], {"axis": 1}
    scales = numpy_helper.from_array(scales_JN.astype(np.float16), "scales")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [K, N])
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["y"], **options)
    graph = helper.make_graph([node], "g", [], [y], [codes, scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    found: Any = ReferenceEvaluator(model).run(None, {})
    found_KN = found[0]
    np.testing.assert_array_equal(found_KN.T, dequantise(blocks, form).astype(np.float16))
    assert block_error(found_KN.T.astype(np.float32), w_NK, form) <= form.largest_error + 2.0**-11


def test_a_row_that_no_block_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="48 inputs are no multiple of 32"):
        STANDARD[1].of_rows(48)


def test_scales_of_float16_are_rounded_before_the_codes() -> None:
    """Codes of the unrounded scale have a larger error, at 8 bits."""
    form = HALF[0]
    of_exact = quantise(weight(), replace(form, half_scales=False))
    of_exact = replace(of_exact, scales=of_exact.scales.astype(np.float16).astype(np.float32))
    exact, rounded = (np.square(dequantise(b, form) - weight()).sum() for b in (of_exact, quantise(weight(), form)))
    assert rounded < exact


@pytest.mark.parametrize("form", FORMATS)
def test_dequantise_reads_what_the_operator_reads(form: Format) -> None:
    """Rows of the unit matrix, without rounded activations, give the weight back."""
    import onnxruntime

    blocks = quantise(weight(), form)
    given: dict[str, np.ndarray] = {"codes": blocks.codes, "scales": blocks.scales}
    if blocks.zeros is not None:
        given["zeros"] = blocks.zeros
    sizes: dict[str, Any] = {"K": K, "N": N, "bits": form.bits, "block_size": form.block, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", ["x", *given], ["y"], domain="com.microsoft", **sizes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name, n in (("x", K), ("y", N)))
    tensors = [numpy_helper.from_array(array, name) for name, array in given.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], tensors), opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got_KN = session.run(None, {"x": np.eye(K, dtype=np.float32)})[0]
    np.testing.assert_allclose(got_KN.T, dequantise(blocks, form), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_codes_are_those_of_onnxruntimes_own_packer(form: Format) -> None:
    binding = pytest.importorskip("onnxruntime.capi._pybind_state")
    pack = getattr(binding, f"quantize_matmul_{form.bits}bits")
    w_NK = weight(1)[4:]  # ordinary rows: ONNX Runtime leaves the scale of a block of zeros undefined
    n, j = len(w_NK), K // form.block
    codes = np.zeros((n, j, form.block * form.bits // 8), np.uint8)
    scales, zeros = np.zeros(n * j, np.float32), np.zeros(n * -(-j * form.bits // 8), np.uint8)
    pack(codes, np.ascontiguousarray(w_NK.T), scales, zeros, form.block, n, K, not form.zero_points)
    ours = quantise(w_NK, form)
    np.testing.assert_array_equal(ours.scales, scales.reshape(n, j))
    assert (ours.codes != codes).mean() < 1e-3  # a tie may be rounded the other way
    assert (ours.zeros is not None) == form.zero_points
    if ours.zeros is not None:
        np.testing.assert_array_equal(ours.zeros, zeros.reshape(ours.zeros.shape))


def test_a_shrunk_scale_is_never_worse_and_often_better() -> None:
    w_NK = weight()
    plain, shrunk = (dequantise(quantise(w_NK, f), f) for f in (replace(SHRUNK, shrink=()), SHRUNK))
    errors = [np.square(got - w_NK).reshape(N, -1, SHRUNK.block).sum(-1) for got in (plain, shrunk)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1][4:].sum() < 0.98 * errors[0][4:].sum()  # of the ordinary rows


def test_large_weights_are_rounded_in_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise(weight(), FORMATS[3])
    monkeypatch.setattr("blt_export.quantize.blockwise._AT_ONCE", 2 * K)
    grouped = quantise(weight(), FORMATS[3])
    for name in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(grouped, name), getattr(whole, name))


def swapped(blocks: Blocks) -> Blocks:
    codes = blocks.codes.copy()
    codes[5, 1] = codes[5, 1] << 4 | codes[5, 1] >> 4
    return replace(blocks, codes=codes)


def scaled(blocks: Blocks) -> Blocks:
    scales = blocks.scales.copy()
    scales[5, 1] *= 1.5
    return replace(blocks, scales=scales)


def moved(blocks: Blocks) -> Blocks:
    codes = blocks.codes.copy()
    codes[5, 1] = codes[5, 2]
    return replace(blocks, codes=codes)


@pytest.mark.parametrize("fault", [swapped, scaled, moved])
@pytest.mark.parametrize("form", [*FORMATS, SHRUNK])
def test_one_wrong_block_exceeds_the_bound(form: Format, fault: Callable[[Blocks], Blocks]) -> None:
    blocks = fault(quantise(weight(), form))
    assert block_error(dequantise(blocks, form), weight(), form) > 1.3 * form.largest_error

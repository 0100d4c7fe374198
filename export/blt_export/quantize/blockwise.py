"""Weights of 8 or 4 bits in blocks, packed as ONNX Runtime's `com.microsoft::MatMulNBits` reads them.

`signed` gives the same codes around zero, for ONNX's `DequantizeLinear`.

A row of a weight (all inputs of one output) is cut into blocks; each block has a float32 scale and a zero point:
weight = (code - zero) * scale. Codes are unsigned; without stored zero points the zero is 2^(bits-1). Two 4-bit codes
share a byte, the first in the low half; so do two zero points of one row.

Shapes: codes [N, J, S * bits / 8], scales [N, J], zero points [N, J * bits / 8 rounded up].

Letters: N outputs, K inputs, J blocks of a row, S weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
WHOLE_ROW = 0
"""Block of a format whose scale is that of all inputs of an output."""
_AT_ONCE = 1 << 20
"""Weights that are rounded in one numpy call, so that temporary arrays stay small."""


@dataclass(frozen=True)
class Format:
    """How a weight is packed.

    bits: 8 or 4. block: weights that share a scale, a power of two from 16, or WHOLE_ROW. zero_points: stored, one a
    block.
    shrink: factors of the scale to try; the one with the least squared error is kept. A smaller scale clips the largest
    weights and rounds the others finer.
    half_scales: each scale is a float16 number, and the codes are those of that number.
    positive: scales are above zero, as TensorRT demands at 8 bits. A block's largest weight then has the largest code.
    """

    bits: int
    block: int
    zero_points: bool = False
    shrink: tuple[float, ...] = ()
    half_scales: bool = False
    positive: bool = False

    def of_rows(self, k: int) -> Format:
        """The format for rows of k weights, with a block that is a number. Raises ValueError if none fits."""
        if k % (self.block or k):
            raise ValueError(f"{k} inputs are no multiple of {self.block}")
        return replace(self, block=self.block or k)

    @property
    def middle(self) -> int:
        """The code of zero where no zero points are stored."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Including its share of the scale and the zero point."""
        return self.bits + ((16 if self.half_scales else 32) + self.bits * self.zero_points) / self.block

    @property
    def largest_error(self) -> float:
        """The largest error that rounding can cause: root mean square of a block, relative to its largest weight.

        A shrunk scale is used only where it is better, so the bound is that of the whole range. With zero points it is
        half a step of a range that is at most twice the largest weight. Without, it is a whole step, the largest weight
        over 2^(bits-1), because the opposite of the largest weight has no exact code; of positive scales it is half a
        step. A thousandth is added for the roundings of float32, and for a scale of float16 its rounding.
        """
        steps = (1 << self.bits) - 1 if self.zero_points else self.middle
        if self.positive:
            steps = 2 * (self.middle - 1)
        return 1.001 / steps + (2.0**-11 if self.half_scales else 0.0)

    @property
    def smallest(self) -> float:
        """The largest weight of a block below which its float16 scale is subnormal, so that its rounding has no bound
        relative to it."""
        return 2.0**-14 * self.middle if self.half_scales else 0.0


@dataclass(frozen=True)
class Blocks:
    """A packed weight; shapes above."""

    codes: Bytes
    scales: Floats
    zeros: Bytes | None


def quantise(w_NK: Floats, form: Format) -> Blocks:
    """Pack a weight whose K is a multiple of the block."""
    packed = [_quantise(rows_NJS, form) for rows_NJS in _row_groups(w_NK, form)]
    codes, scales, zeros = (np.concatenate([rows[i] for rows in packed]) for i in range(3))
    return Blocks(codes, scales, zeros if form.zero_points else None)


def dequantise(blocks: Blocks, form: Format) -> Floats:
    """The weight [N, K] that the packed form represents."""
    n, j = blocks.scales.shape
    code_NJS = _unpack(blocks.codes, form.bits).reshape(n, j, form.block)
    zero_NJ: Any = np.float32(form.middle)
    if blocks.zeros is not None:
        zero_NJ = _unpack(blocks.zeros, form.bits)[:, :j, None].astype(np.float32)
    w_NJS: Floats = (code_NJS.astype(np.float32) - zero_NJ) * blocks.scales[:, :, None]
    return w_NJS.reshape(n, j * form.block)


def signed(blocks: Blocks, form: Format) -> npt.NDArray[np.int8]:
    """The codes [N, K] around zero, of a format without zero points."""
    codes_NJS = _unpack(blocks.codes, form.bits).astype(np.int16) - form.middle
    return codes_NJS.astype(np.int8).reshape(len(codes_NJS), -1)


def from_signed(codes_NK: npt.NDArray[np.int8], scales_NJ: Floats, form: Format) -> Blocks:
    """The inverse of `signed`."""
    n, j = scales_NJ.shape
    codes_NJS = (codes_NK.astype(np.int16) + form.middle).astype(np.uint8).reshape(n, j, form.block)
    return Blocks(_pack(codes_NJS, form.bits), scales_NJ, None)


def block_error(got_NK: Floats, want_NK: Floats, form: Format) -> float:
    """The largest root mean square error of any block, relative to its largest |want|, or to `form.smallest` if that is
    larger (of zeros: absolute)."""
    got_NJS, want_NJS = (w.reshape(len(w), -1, form.block) for w in (got_NK, want_NK))
    largest_NJ = np.maximum(np.abs(want_NJS).max(-1), form.smallest)
    error_NJ = np.sqrt(np.square(got_NJS - want_NJS).mean(-1)) / np.where(largest_NJ > 0, largest_NJ, 1)
    return float(error_NJ.max(initial=0.0)) if np.isfinite(error_NJ).all() else float("inf")


def _row_groups(w_NK: Floats, form: Format) -> Iterator[Floats]:
    """A few rows at a time, cut into blocks."""
    n, k = w_NK.shape
    rows = max(1, _AT_ONCE // k)
    for start in range(0, n, rows):
        group_NK = np.ascontiguousarray(w_NK[start : start + rows], np.float32)
        yield group_NK.reshape(len(group_NK), k // form.block, form.block)


def _quantise(w_NJS: Floats, form: Format) -> tuple[Bytes, Floats, Bytes]:
    """Packed codes, scales and packed zero points of some rows."""
    scale_NJ, zero_NJ = _fit(w_NJS, form)
    scale_NJ = _stored(scale_NJ, form)
    if form.shrink:
        scale_NJ = _shrunk(w_NJS, scale_NJ, zero_NJ, form)
    code_NJS = _round(w_NJS, scale_NJ, zero_NJ, form).astype(np.uint8)
    return _pack(code_NJS, form.bits), scale_NJ, _pack(zero_NJ.astype(np.uint8), form.bits)


def _fit(w_NJS: Floats, form: Format) -> tuple[Floats, Floats]:
    """Scale and zero point [N, J] of each block.

    With zero points, the codes span the block's range and zero, which stays exact. Without, the largest weight gets the
    code 0 and the scale has its sign: below the middle there is one code more than above. A positive scale gives it the
    code 1 or the last one.
    """
    if form.zero_points:
        low_NJ, high_NJ = np.minimum(w_NJS.min(-1), 0), np.maximum(w_NJS.max(-1), 0)
        scale_NJ = (high_NJ - low_NJ) / np.float32((1 << form.bits) - 1)
        return scale_NJ, np.rint(-low_NJ / _nonzero(scale_NJ))
    zero_NJ = np.full(w_NJS.shape[:2], form.middle, np.float32)
    if form.positive:
        return np.abs(w_NJS).max(-1) / np.float32(form.middle - 1), zero_NJ
    at_NJ1 = np.abs(w_NJS).argmax(-1)[..., None]
    scale_NJ = np.take_along_axis(w_NJS, at_NJ1, -1)[..., 0] / np.float32(-form.middle)
    return scale_NJ, zero_NJ


def _shrunk(w_NJS: Floats, scale_NJ: Floats, zero_NJ: Floats, form: Format) -> Floats:
    best_NJ, least_NJ = scale_NJ, _squared_error(w_NJS, scale_NJ, zero_NJ, form)
    for factor in form.shrink:
        tried_NJ = _stored(scale_NJ * np.float32(factor), form)
        error_NJ = _squared_error(w_NJS, tried_NJ, zero_NJ, form)
        best_NJ, least_NJ = np.where(error_NJ < least_NJ, tried_NJ, best_NJ), np.minimum(error_NJ, least_NJ)
    return best_NJ


def _squared_error(w_NJS: Floats, scale_NJ: Floats, zero_NJ: Floats, form: Format) -> Floats:
    steps_NJS = _round(w_NJS, scale_NJ, zero_NJ, form) - zero_NJ[..., None]
    error_NJ: Floats = np.square(steps_NJS * scale_NJ[..., None] - w_NJS).sum(-1)
    return error_NJ


def _round(w_NJS: Floats, scale_NJ: Floats, zero_NJ: Floats, form: Format) -> Floats:
    """The codes, as floats."""
    code_NJS: Floats = np.rint(w_NJS / _nonzero(scale_NJ)[..., None]) + zero_NJ[..., None]
    return code_NJS.clip(0, (1 << form.bits) - 1)


def _stored(scale_NJ: Floats, form: Format) -> Floats:
    """The scales as they are stored."""
    with np.errstate(over="ignore"):
        stored_NJ = scale_NJ.astype(np.float16).astype(np.float32) if form.half_scales else scale_NJ
    return _nonzero(stored_NJ) if form.positive else stored_NJ


def _nonzero(scale_NJ: Floats) -> Floats:
    return np.where(scale_NJ == 0, np.float32(1), scale_NJ)


def _pack(values: Bytes, bits: int) -> Bytes:
    """Two values a byte along the last axis, the first in the low half; an odd count is padded with 0."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
    packed: Bytes = values[..., 0::2] | values[..., 1::2] << np.uint8(4)
    return packed


def _unpack(packed: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)

"""Hash tables in 8 bits: rows of codes, each row with a scale (`blt_runtime.hashing.TABLE_DTYPES`).

A row's scale is its largest |value| / 127. Its codes are the values over the scale, rounded to the nearest, ties to
even. So the error of a value is at most half a scale, zeros stay zeros, and a row's largest value keeps its size.

Letters: N rows, D width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blt_runtime.hashing import SCALE_BYTES

LARGEST = 127


def quantise_rows(rows_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """Stored rows int8 [N, D + 4] of finite values."""
    scale_N1 = np.abs(rows_ND).max(1, keepdims=True) / np.float32(LARGEST)
    steps_ND = rows_ND / np.where(scale_N1 == 0, np.float32(1), scale_N1)
    stored = np.empty((len(rows_ND), rows_ND.shape[1] + SCALE_BYTES), np.int8)
    stored[:, :-SCALE_BYTES] = np.rint(steps_ND).clip(-LARGEST, LARGEST)
    stored[:, -SCALE_BYTES:] = scale_N1.astype("<f4").view(np.int8)
    return stored

"""Bytes to ids and back (spec section 1): id = byte + 4; ids 0 to 3 are special."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from .errors import InputError

BOE: Final = 0
"""Also the padding id, and the zero before the start of a row in the hash windows."""
BOS: Final = 1
EOS: Final = 2
BPE: Final = 3
"""Delimiter for the patch scheme `bpe`; no other scheme uses it."""
OFFSET: Final = 4
VOCAB: Final = 260
NEWLINE: Final = OFFSET + 0x0A

Ids = npt.NDArray[np.int64]


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8; characters that have no encoding (lone surrogates) are dropped, as in facebookresearch/blt."""
    return text.encode("utf-8", errors="ignore") if isinstance(text, str) else bytes(text)


def encode(text: str | bytes, bos: bool = True, eos: bool = False) -> Ids:
    """Ids [N] int64 of text or bytes, with BOS before and EOS after them if `bos` and `eos` are set."""
    values_N = np.frombuffer(to_bytes(text), dtype=np.uint8).astype(np.int64) + OFFSET
    return np.concatenate([[BOS] if bos else [], values_N, [EOS] if eos else []]).astype(np.int64)


def decode(ids: npt.ArrayLike) -> bytes:
    """The bytes of ids [N]; special ids (below 4) are skipped. Raises ValueError for ids outside 0..259."""
    ids_N = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids_N.size and (ids_N.min() < 0 or ids_N.max() >= VOCAB):
        raise ValueError(f"ids must be in 0..{VOCAB - 1}")
    return (ids_N[ids_N >= OFFSET] - OFFSET).astype(np.uint8).tobytes()


def checked_ids(ids: npt.ArrayLike, vocab_size: int) -> Ids:
    """A caller's ids as [N] int64. Raises InputError for anything else, and for ids outside the vocabulary."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError("ids must be a list of whole numbers")
    ids_N = array.astype(np.int64)
    if len(ids_N) and (ids_N.min() < 0 or ids_N.max() >= vocab_size):
        raise InputError(f"ids must be in 0..{vocab_size - 1}")
    return ids_N

"""Bytes to ids and back (spec section 1): id = byte + 4; ids 0 to 3 are special."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .arguments import as_bytes, is_whole
from .errors import InputError, UsageError

BOE: Final = 0
"""Also the padding id, and the zero before the start of a row in the hash windows."""
BOS: Final = 1
EOS: Final = 2
BPE: Final = 3
"""Delimiter for the patch scheme `bpe`; no other scheme uses it."""
OFFSET: Final = 4
VOCAB: Final = 260
NEWLINE: Final = OFFSET + 0x0A
BYTES: Final = [b""] * OFFSET + [bytes([value]) for value in range(256)]
"""The bytes of each id."""

Ids = npt.NDArray[np.int64]
NOT_IDS: Final = "ids must be a list of whole numbers (append reads text and bytes)"


def to_bytes(text: str | bytes, name: str = "the text") -> bytes:
    """UTF-8; characters that have no encoding (lone surrogates) are dropped, as in facebookresearch/blt. Raises
    UsageError, which calls it `name`, for anything but text and bytes."""
    return as_bytes(name, text)


def encode(text: str | bytes, bos: bool = True, eos: bool = False) -> Ids:
    """Ids [N] int64 of text or bytes, with BOS before and EOS after them if `bos` and `eos` are set. Raises UsageError
    for anything but text and bytes."""
    values_N = np.frombuffer(to_bytes(text), dtype=np.uint8).astype(np.int64) + OFFSET
    return np.concatenate([[BOS] if bos else [], values_N, [EOS] if eos else []]).astype(np.int64)


def decode(ids: npt.ArrayLike) -> bytes:
    """The bytes of ids [N]; special ids (below 4) are skipped. Raises InputError for ids outside 0..259."""
    ids_N = checked_ids(ids, VOCAB)
    return (ids_N[ids_N >= OFFSET] - OFFSET).astype(np.uint8).tobytes()


def shared_length(a_N: npt.NDArray[Any], b_M: npt.NDArray[Any]) -> int:
    """The length of the longest beginning that both arrays have."""
    size = min(len(a_N), len(b_M))
    differ = np.flatnonzero(a_N[:size] != b_M[:size])
    return int(differ[0]) if len(differ) else size


def checked_ids(ids: npt.ArrayLike, vocab_size: int) -> Ids:
    """A caller's ids as [N] int64. Raises UsageError for anything but a list of whole numbers, and InputError for ids
    outside the vocabulary."""
    if isinstance(ids, str | bytes | bytearray | memoryview):
        raise UsageError(NOT_IDS)
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged lists, tensors of other devices
        raise UsageError(NOT_IDS) from error
    if array.ndim != 1 or (array.size and not _are_whole(ids, array)):
        raise UsageError(NOT_IDS)
    if array.dtype.kind == "O" or (array.size and (array.min() < 0 or array.max() >= vocab_size)):
        raise InputError(f"ids must be in 0..{vocab_size - 1}")
    return array.astype(np.int64)


def _are_whole(ids: npt.ArrayLike, array: npt.NDArray[Any]) -> bool:
    """numpy turns a bool in a list of numbers into 1, and keeps numbers of more than 64 bits as objects."""
    if isinstance(ids, list | tuple) and any(isinstance(id, bool | np.bool_) for id in ids):
        return False
    return array.dtype.kind in "iu" or (array.dtype.kind == "O" and all(map(is_whole, array)))

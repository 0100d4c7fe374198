"""Pages of memory-mapped tensors: released to the operating system after they were read."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_MADV_DONTNEED = 4
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def drop_pages(tensor: Tensor) -> None:
    """Releases the pages that are wholly inside a tensor of a mapped file; they are read again when needed.

    Only for mapped files: the content of ordinary memory would be lost.
    """
    if _libc is None or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    if stop > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)

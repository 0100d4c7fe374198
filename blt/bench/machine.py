"""Measurements of the machine and of this process: read bandwidth of main memory, peak memory, resident pages.

numpy and the C library only, so that it runs where a bundle runs.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUFFER = 1 << 30
"""Bytes that a sweep reads: many times the caches of one socket."""
PIECE = 32 << 20
SWEEPS = 3
"""Of each method in one `sample`."""

Piece = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """The fastest sweep so far: bytes per second, method, size of the buffer, number of threads (None: a device)."""

    bytes_per_s: float
    method: str
    buffer_bytes: int
    threads: int | None


class MemoryReader:
    """Sweeps over a buffer in main memory on `threads` threads; `best` is the fastest sweep of all samples.

    There are two methods, and both release the interpreter's lock: numpy's OR over 64-bit words, and the C library's
    memchr for a byte that the buffer does not contain. Which one is faster depends on the processor. The best sweep
    counts, because other processes can only lower the bandwidth. Raises MemoryError if the buffer cannot be allocated.
    """

    def __init__(self, threads: int, size: int = BUFFER) -> None:
        self.threads = threads
        words = np.empty(size // 8, dtype=np.uint64)
        self._pieces = [words[start : start + PIECE // 8] for start in range(0, len(words), PIECE // 8)]
        self._pool = ThreadPoolExecutor(threads)
        self._each(lambda piece: piece.fill(0x0101010101010101))  # a first write maps the pages
        self._methods = _methods()
        n_bytes = sum(piece.nbytes for piece in self._pieces)
        self.best = Bandwidth(bytes_per_s=0.0, method="", buffer_bytes=n_bytes, threads=threads)

    def sample(self) -> Bandwidth:
        """SWEEPS more sweeps of each method; returns the best of all samples."""
        for name, read in self._methods.items():
            for _ in range(SWEEPS):
                began = time.perf_counter()
                self._each(read)
                rate = self.best.buffer_bytes / (time.perf_counter() - began)
                if rate > self.best.bytes_per_s:
                    self.best = replace(self.best, bytes_per_s=rate, method=name)
        return self.best

    def close(self) -> None:
        """Frees the buffer and stops the threads."""
        self._pool.shutdown()
        self._pieces.clear()

    def _each(self, read: Callable[[Piece], Any]) -> None:
        for _ in self._pool.map(read, self._pieces):
            pass


def _methods() -> dict[str, Callable[[Piece], Any]]:
    found: dict[str, Callable[[Piece], Any]] = {"numpy bitwise_or": np.bitwise_or.reduce}
    try:
        memchr = ctypes.CDLL(None).memchr
    except (AttributeError, OSError, TypeError):  # the platform has no C library to load
        return found
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    return {**found, "memchr": lambda piece: memchr(piece.ctypes.data, 0, piece.nbytes)}


def cpu_name() -> str:
    """The processor's name as the system gives it; empty if it gives none."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, mapped files included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes(file_name: str) -> int | None:
    """Resident bytes of the mapped files of this name; None on a platform without /proc/self/smaps."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    total, ours = 0, False
    for line in lines:
        if not line.split(maxsplit=1)[0].endswith(":"):  # the first line of a mapping: addresses, permissions, path
            ours = line.endswith(f"/{file_name}")
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

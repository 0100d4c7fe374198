"""What ONNX Runtime's errors mean. It has no classes for them, only texts."""

from __future__ import annotations

import re

from ..errors import BackendError

_NO_MEMORY = re.compile(
    r"allocate memory for requested buffer of size (\d+)|smaller than requested bytes of (\d+)|bad_?alloc"
    r"|out of memory|_ALLOC_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
_CUDA_CODE = re.compile(r"CUDA (?:failure|error) (\d+)", re.IGNORECASE)
DEAD = {
    "cudaErrorECCUncorrectable": 214,
    "cudaErrorContained": 226,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchTimeout": 702,
    "cudaErrorContextIsDestroyed": 709,
    "cudaErrorAssert": 710,
    "cudaErrorHardwareStackError": 714,
    "cudaErrorIllegalInstruction": 715,
    "cudaErrorMisalignedAddress": 716,
    "cudaErrorInvalidAddressSpace": 717,
    "cudaErrorInvalidPc": 718,
    "cudaErrorLaunchFailure": 719,
    "cudaErrorTensorMemoryLeak": 721,
    "cudaErrorMpsClientTerminated": 810,
    "cudaErrorExternalDevice": 911,
}
"""CUDA's errors after which every call of the process fails, by name: ONNX Runtime's texts have the number, CUDA's
bindings the name. CUDA documents all but two as such; a context that is destroyed or whose memory is broken (709, 214)
is of no use either."""


class Failures:
    """The errors of one backend. `dead`: the error after which its device answers no more; empty while it does."""

    def __init__(self, provider: str = "cpu") -> None:
        self.provider, self.dead = provider, ""

    def check(self) -> None:
        """Raises BackendError if the device has failed. Calls on it could hang."""
        if self.dead:
            raise BackendError(f"provider {self.provider} has failed ({self.dead}): start the process again")

    def of(self, what: str, error: Exception) -> Exception:
        """`failure`, and remembers an error after which the device answers no more."""
        found = failure(what, error)
        code = _CUDA_CODE.search(str(error))
        if isinstance(found, BackendError) and code is not None and int(code[1]) in DEAD.values():
            self.dead = f"CUDA error {code[1]}"
            return BackendError(f"{found}: the device answers no more, start the process again")
        return found


def failure(what: str, error: Exception) -> Exception:
    """A BackendError, or a MemoryError for what onnxruntime could not allocate."""
    if found := _NO_MEMORY.search(str(error)):
        size = found[1] or found[2]
        return MemoryError(f"{what}: no {int(size):,} bytes" if size else what)
    return BackendError(f"{what}: {first_line(error)}")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

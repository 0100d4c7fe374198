"""The NVIDIA side of a machine, before anything loads ONNX Runtime's CUDA provider or TensorRT.

Driver, GPUs and libraries. TensorRT ends the process where there is no device, and ONNX Runtime falls back to the CPU
with a warning. So `probe` asks the driver first, through ctypes, and each check raises a BackendError of one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import BackendError, install_command

Load = Callable[[str], Any]
"""Opens a shared library by its name or path. Raises OSError."""

DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
OLDEST_DRIVER = {12: "525", 13: "580"}
"""The first driver for each major version of CUDA."""
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
"""Both own the module onnxruntime, and overwrite each other's files."""
_NO_DEVICE, _STUB, _MISMATCH = 100, 34, 803
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
_LOADED, _DYNAMIC = 1, 2  # program headers of ELF
_NEEDED, _STRINGS = 1, 5  # entries of its dynamic section


@dataclass(frozen=True)
class Gpu:
    """name: as the driver has it. memory: bytes in total."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Nvidia:
    """driver: its version; None where only the GPUs are known. cuda: the newest version that the driver supports.
    gpus: those that this process sees (CUDA_VISIBLE_DEVICES), in CUDA's order; at least one."""

    driver: str | None
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def probe(load: Load = ctypes.CDLL) -> Nvidia:
    """The driver and its GPUs. Creates no context, allocates nothing on a GPU.

    load: replaces the dynamic linker in tests. Raises BackendError without a driver and without a device.
    """
    try:
        cuda = load(DRIVER)
    except OSError as error:
        raise BackendError(f"no NVIDIA driver: {DRIVER} is not installed") from error
    version = driver_version(load)
    _init(cuda, version)
    count, supported = ctypes.c_int(), ctypes.c_int()
    _do(cuda, "cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise _no_device(version)
    _do(cuda, "cuDriverGetVersion", ctypes.byref(supported))
    newest = supported.value // 1000, supported.value % 1000 // 10
    return Nvidia(version, newest, tuple(_gpu(cuda, index) for index in range(count.value)))


def driver_version(load: Load = ctypes.CDLL) -> str | None:
    """The driver's version, such as "580.65.06"; None if its management library (NVML) does not say."""
    with contextlib.suppress(OSError, AttributeError):
        management, text = load(MANAGEMENT), ctypes.create_string_buffer(80)
        if management.nvmlInit_v2() == 0:
            failed = management.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
            management.nvmlShutdown()
            return None if failed else text.value.decode(errors="replace")
    return None


def check_distributions(installed: Callable[[str], object] = metadata.version) -> None:
    """Raises BackendError if two distributions of ONNX Runtime are installed. installed: raises for those that are
    not."""
    if all(_is_installed(name, installed) for name in DISTRIBUTIONS):
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu, then {install_command('gpu')}"
        )


def check_driver(found: Nvidia, cuda: str, library: str) -> None:
    """Raises BackendError if the driver is too old for a library that was built for that version of CUDA ("13.0")."""
    major = int(re.match(r"\d*", cuda)[0] or 0)  # type: ignore[index]
    if found.cuda[0] < major:
        here = f"the NVIDIA driver{f' {found.driver}' if found.driver else ''} supports CUDA {_dotted(found.cuda)}"
        oldest = f" ({OLDEST_DRIVER[major]} or newer)" if major in OLDEST_DRIVER else ""
        raise BackendError(f"{here}, but {library} needs CUDA {major}: install a newer driver{oldest}")


def check_libraries(names: Iterable[str], what: str, extra: str, load: Load | None = None) -> None:
    """Loads shared libraries, from NVIDIA's pip packages where they are installed: ONNX Runtime finds them only then.

    what: needs them. extra: installs them. Raises BackendError that names the missing ones.
    """
    waiting, tried = list(names), 0
    while waiting and len(waiting) != tried:  # one may need another of them, which is not in the linker's folders
        tried = len(waiting)
        waiting = [name for name in waiting if not _loads(name, _load_global if load is None else load)]
    if waiting:
        raise BackendError(f"{what} needs {', '.join(waiting)}, which cannot be loaded: {install_command(extra)}")


def needed_libraries(library: Path) -> tuple[str, ...]:
    """NVIDIA's shared libraries that a library of 64-bit Linux is linked to (ELF, DT_NEEDED). Raises BackendError."""
    try:
        with library.open("rb") as file:
            return tuple(name for name in _needed(file) if name.startswith(("libcu", "libnv")))
    except (OSError, struct.error, ValueError, IndexError) as error:
        raise BackendError(f"{library} is missing or damaged: {install_command('gpu')}") from error


def packaged_file(name: str) -> Path | None:
    """A shared library in NVIDIA's pip packages (nvidia/*/lib, tensorrt_libs); None if it is in none of them."""
    for package, pattern in (("nvidia", f"*/lib/{name}"), ("tensorrt_libs", name)):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for file in sorted(Path(folder).glob(pattern)):
                return file
    return None


# --- parts -------------------------------------------------------------------------------------------------


def _init(cuda: Any, version: str | None) -> None:
    code = int(cuda.cuInit(ctypes.c_uint(0)))
    if code == _NO_DEVICE:
        raise _no_device(version)
    if code == _MISMATCH:
        raise BackendError("the NVIDIA driver and its kernel module have different versions: restart the machine")
    if code == _STUB:
        raise BackendError(f"no NVIDIA driver: {DRIVER} is the stub of the CUDA toolkit")
    if code:
        raise BackendError(f"the NVIDIA driver does not start: {_error_name(cuda, code)}")


def _no_device(version: str | None) -> BackendError:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return BackendError(f"the NVIDIA driver{f' {version}' if version else ''} finds no GPU{hidden}")


def _gpu(cuda: Any, index: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _do(cuda, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _do(cuda, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    _do(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _do(cuda, "cuDeviceGetAttribute", ctypes.byref(number), ctypes.c_int(attribute), device)
        numbers.append(number.value)
    return Gpu(name.value.decode(errors="replace"), (numbers[0], numbers[1]), memory.value)


def _do(cuda: Any, name: str, *arguments: Any) -> None:
    if code := int(getattr(cuda, name)(*arguments)):
        raise BackendError(f"{name} of the NVIDIA driver failed: {_error_name(cuda, code)}")


def _error_name(cuda: Any, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
    return f"error {code}" if text.value is None else text.value.decode(errors="replace")


def _is_installed(name: str, installed: Callable[[str], object]) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        installed(name)
        return True
    return False


def _load_global(name: str) -> Any:
    return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)


def _loads(name: str, load: Load) -> bool:
    packaged = packaged_file(name)
    for candidate in (*([] if packaged is None else [str(packaged)]), name):
        with contextlib.suppress(OSError):
            load(candidate)
            return True
    return False


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _needed(file: Any) -> Iterable[str]:
    """Names that an ELF file's dynamic section lists. Only headers and that section are read."""

    def read(layout: str, offset: int) -> tuple[Any, ...]:
        file.seek(offset)
        return struct.unpack(layout, file.read(struct.calcsize(layout)))

    identity, headers, size, count = (*read("<6s", 0), *read("<Q", 32), *read("<HH", 54))
    if identity != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    segments = [read("<IIQQQQ", headers + size * i) for i in range(count)]  # kind, flags, offset, address, _, bytes
    entries = [
        read("<QQ", segment[2] + 16 * i)
        for segment in segments
        if segment[0] == _DYNAMIC
        for i in range(segment[5] // 16)
    ]
    strings = [
        segment[2] + value - segment[3]
        for kind, value in entries
        if kind == _STRINGS
        for segment in segments
        if segment[0] == _LOADED and segment[3] <= value < segment[3] + segment[5]
    ]
    for value in (value for kind, value in entries if kind == _NEEDED):
        file.seek(strings[0] + value)
        yield file.read(256).split(b"\0")[0].decode()

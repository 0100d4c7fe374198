"""What a machine has for GPUs, as JSON: `python -m blt_runtime.backends.inventory PART`.

Each part loads libraries that can end the process or hang on a broken machine, so `blt env` reads it in a process of
its own (`ask`).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import BltError
from . import nvidia
from .onnx import import_library

LIMIT_S = 20.0
CUDART, CUDNN, NVINFER = (
    ("libcudart.so.13", "libcudart.so.12"),
    ("libcudnn.so.9",),
    ("libnvinfer.so.11", "libnvinfer.so.10"),
)


def gpus() -> dict[str, Any]:
    """NVIDIA's driver and GPUs."""
    found = nvidia.probe()
    listed = [
        {"name": gpu.name, "compute_capability": ".".join(map(str, gpu.compute_capability)), "memory_bytes": gpu.memory}
        for gpu in found.gpus
    ]
    return {"driver": found.driver, "cuda": ".".join(map(str, found.cuda)), "gpus": listed}


def libraries() -> dict[str, Any]:
    """Versions of NVIDIA's shared libraries; None for those that cannot be loaded. No device is needed."""
    return {"cuda": _cuda(), "cudnn": _cudnn(), "tensorrt": _tensorrt()}


def onnxruntime() -> dict[str, Any]:
    """Version, providers and devices of the installed build, with those of the WebGPU plugin."""
    library = import_library()
    report = {"version": library.__version__, "providers": library.get_available_providers()}
    try:
        import onnxruntime_ep_webgpu as plugin

        library.register_execution_provider_library("webgpu", plugin.get_library_path())
    except ImportError:
        pass
    devices = [
        {"provider": found.ep_name, "type": found.device.type.name.lower(), "vendor": found.device.vendor}
        for found in library.get_ep_devices()
    ]
    return {**report, "devices": devices}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"gpus": gpus, "libraries": libraries, "onnxruntime": onnxruntime}


def ask(part: str, limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> dict[str, Any] | None:
    """A part, read in another process; None for a library that is not installed. A process that fails, ends or takes
    longer than `limit_s` gives {"error": ...}. command: another process, for tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = command or (sys.executable, "-m", __name__, part)
    try:
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=limit_s, errors="replace")
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {limit_s:g} s"}
    if done.returncode < 0:
        return {"error": f"the process was ended by signal {-done.returncode}"}
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1][:300] if lines else f"exit code {done.returncode}"}
    return found if isinstance(found, dict) else None


def main(part: str) -> None:
    """Prints the part as one line: an object, or null for a library that is not installed."""
    try:
        found: dict[str, Any] | None = PARTS[part]()
    except ModuleNotFoundError:
        found = None
    except (BltError, ImportError, OSError) as error:
        found = {"error": str(error)}
    print(json.dumps(found))


def _cuda() -> str | None:
    library, version = _load(CUDART), ctypes.c_int()
    if library is None or library.cudaRuntimeGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cudnn() -> str | None:
    library = _load(CUDNN)
    if library is None:
        return None
    library.cudnnGetVersion.restype = ctypes.c_size_t
    return _three(library.cudnnGetVersion())


def _tensorrt() -> str | None:
    library = _load(NVINFER)
    return None if library is None else _three(library.getInferLibVersion())


def _three(version: int) -> str:
    """91002 as 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _load(names: Sequence[str]) -> Any:
    for name in names:
        packaged = nvidia.packaged_file(name)
        for candidate in (*([] if packaged is None else [str(packaged)]), name):
            try:
                return ctypes.CDLL(candidate)
            except OSError:
                continue
    return None


if __name__ == "__main__":
    main(sys.argv[1])

"""`blt env`: versions, providers and devices as JSON, for bug reports."""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Annotated, Any

import typer

from blt import __version__
from blt.cli import console, options

PACKAGES = (
    "blt-runtime", "numpy", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx", "pydantic", "pyyaml", "rich", "typer", "matplotlib", "starlette", "uvicorn", "prometheus-client",
    "jinja2", "llguidance", "onnxruntime-ep-webgpu", "cuda-bindings", "nvidia-cudnn-cu13", "tensorrt-cu13",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except ImportError as error:
        return None if isinstance(error, ModuleNotFoundError) else {"error": str(error)}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda": torch.version.cuda, "threads": torch.get_num_threads(), "cuda_devices": devices}


@options.verbosity
def env(
    full: Annotated[bool, typer.Option("--full", help="Also report PyTorch's devices (loads PyTorch).")] = False,
    as_json: options.Json = False,
) -> None:
    """Print versions, providers, GPUs and their libraries as JSON (also without --json), for bug reports."""
    from blt.bench.machine import cpu_name
    from blt_runtime.backends import inventory

    with ThreadPoolExecutor() as pool:
        asked = {part: pool.submit(inventory.ask, part) for part in inventory.PARTS}
    found = {name: _version(name) for name in PACKAGES}
    report: dict[str, Any] = {
        "blt": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "packages": {name.replace("-", "_"): version for name, version in found.items() if version is not None},
        "missing": [name for name, version in found.items() if version is None],
        "onnxruntime": asked["onnxruntime"].result(),
        "nvidia": asked["gpus"].result(),
        "nvidia_libraries": asked["libraries"].result(),
    }
    if full:
        report["torch"] = _torch()
    console.print_json("blt.env/2", report)

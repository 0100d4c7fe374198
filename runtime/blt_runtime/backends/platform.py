"""TensorRT and the GPU of this machine, and engines opened on them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..bundle.engines import Engines, Machine
from ..errors import MissingExtra
from .cuda_device import CudaDevice, Device
from .nvidia import probe
from .tensorrt import TensorRtBackend, TensorRtRows


@dataclass(frozen=True)
class Platform:
    """TensorRT's module, the device, and what they are."""

    trt: Any
    device: Device
    machine: Machine


def open_platform() -> Platform:
    """The first GPU of this process. The driver is asked before TensorRT is loaded, which ends the process where there
    is no device.

    Raises BackendError (no driver, no device) and MissingExtra.
    """
    found = probe()
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingExtra("tensorrt", "tensorrt") from error
    gpu = found.gpus[0]
    machine = Machine(
        trt.__version__,
        gpu.name,
        compute_capability=".".join(map(str, gpu.compute_capability)),
        driver=found.driver or "unknown",
        cuda=".".join(map(str, found.cuda)),
    )
    return Platform(trt, CudaDevice(), machine)


def open_engines(engines: Engines, platform: Platform, *, batched: bool = False) -> TensorRtBackend:
    """Opens the engines of a folder that was checked (`Engines.open`). batched: those for a `Scheduler`
    (`TensorRtRows`).

    Raises BackendError, BundleError and MemoryError, and UsageError if the folder has no engines for batched streams.
    """
    engines.check_machine(platform.machine)
    backend = TensorRtRows if batched else TensorRtBackend
    return backend(engines.spec, engines.plans(rows=batched), platform.trt, platform.device)

"""--device and --threads for PyTorch. `models` passes them to ONNX Runtime."""

from __future__ import annotations

import re

from blt_runtime.errors import BackendError, UsageError


def check_name(device: str) -> None:
    """Raises UsageError unless `device` is auto, cpu, cuda or cuda:n. Does not load PyTorch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: choose auto, cpu or cuda[:n]")


def torch_device(device: str) -> str:
    """`auto` becomes cuda where there is one. Raises UsageError for a wrong name, BackendError for a missing GPU."""
    import torch

    check_name(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
            )
    return device


def limit_torch_threads(threads: int | None) -> None:
    """Sets the threads of PyTorch's operators; None leaves PyTorch's default."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

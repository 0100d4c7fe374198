"""--device and --threads for PyTorch. ONNX Runtime's are in models.py."""

from __future__ import annotations

import re

from blt_runtime.errors import BackendError, UsageError


def torch_device(device: str) -> str:
    """`auto` becomes cuda where there is one. Raises UsageError for a wrong name, BackendError for a missing GPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: choose auto, cpu or cuda[:n]")
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
            )
    return device


def limit_torch_threads(threads: int | None) -> None:
    """Threads of PyTorch's operators; None leaves PyTorch's choice."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

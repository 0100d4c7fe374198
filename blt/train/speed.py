"""What a run gets out of its devices: FLOP/s, their share of the peak (MFU), memory, and the wait for data.

Model FLOPs utilisation is defined by Chowdhery et al. (2022, "PaLM", appendix B): the FLOPs of the model's own forward
and backward passes over the peak of the devices. What is computed again to save memory does not count. The entropy
model of a BLT does not count either: it runs ahead of the step, or before the run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blt.train.config import RunSettings
from blt.train.dryrun import FORWARD_PASSES_PER_STEP
from blt.train.metrics import MetricWindow
from blt.train.parallel import Ranks

TERA = 1e12
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"H100 PCIe", {"bf16": 756, "fp32": 51}),
    (r"H100 NVL|H200 NVL", {"bf16": 835, "fp32": 60}),
    (r"H100|H200|GH200", {"bf16": 989, "fp32": 67}),
    (r"B200", {"bf16": 2250, "fp32": 75}),
    (r"A100", {"bf16": 312, "fp32": 19.5}),
    (r"L40S", {"bf16": 362, "fp32": 91.6}),
    (r"L40", {"bf16": 181, "fp32": 90.5}),
    (r"L4", {"bf16": 121, "fp32": 30.3}),
    (r"A40", {"bf16": 149.7, "fp32": 37.4}),
    (r"A10", {"bf16": 125, "fp32": 31.2}),
    (r"RTX 4090", {"bf16": 165.2, "fp32": 82.6}),
    (r"RTX 3090", {"bf16": 71, "fp32": 35.6}),
    (r"V100", {"fp32": 15.7}),
    (r"T4", {"fp32": 8.1}),
)
"""Peak TFLOP/s by words of the device's name and `run.dtype`, from NVIDIA's data sheets. The first match counts.

bf16 is that of tensor cores on dense matrices with sums in float32; data sheets print twice that, for sparse ones. fp32
is that of float32 without tensor cores, which is torch's default for products (no TF32).
"""


@dataclass(frozen=True)
class Speed:
    """flops_per_byte: of the model's forward pass.  peak: FLOP/s of one device, None if it is not known."""

    device: torch.device
    flops_per_byte: float
    peak: float | None

    @classmethod
    def of(cls, settings: RunSettings, device: torch.device, flops_per_byte: float) -> Speed:
        """The peak is `run.peak_flops`, or that of a well-known GPU."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(device, flops_per_byte, settings.peak_flops or peak_flops(name, settings.dtype))

    def record(self, window: MetricWindow, bytes_per_s: float, ranks: Ranks) -> dict[str, Any]:
        """The numbers of a window that trained on so many bytes per second. Every rank calls it.

        flops_per_s: of all ranks.  mfu: over the peak of all devices, if it is known.  memory_bytes: of the rank with
        the most, on CUDA the allocator's peak since the last call, on a CPU the resident memory now.  data_wait_s:
        seconds that steps waited for their batches, of the rank that waited longest.  data_wait: their share of the
        window's time.
        """
        flops_per_s = FORWARD_PASSES_PER_STEP * self.flops_per_byte * bytes_per_s
        memory, waited = ranks.largest(used_memory(self.device), window.waited)
        mfu = {} if self.peak is None else {"mfu": flops_per_s / (self.peak * ranks.world)}
        return {
            "flops_per_s": flops_per_s,
            **mfu,
            "memory_bytes": int(memory),
            "data_wait_s": waited,
            "data_wait": min(1.0, waited / window.elapsed),
        }


def peak_flops(name: str, dtype: str) -> float | None:
    """FLOP/s of the GPU with this name; None if it is not in the table."""
    found = next((peaks for words, peaks in PEAKS if re.search(rf"\b(?:{words})\b", name)), {})
    return found[dtype] * TERA if dtype in found else None


def used_memory(device: torch.device) -> int:
    """Bytes: on CUDA the allocator's peak, which begins again here; on a CPU the resident memory of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the largest so far instead of the present one
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

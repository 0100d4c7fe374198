"""WebGPU for tests, on SwiftShader where there is no GPU: a Vulkan driver in software that Chromium brings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blt_runtime.backends.onnx import load_library
from blt_runtime.backends.providers import PROVIDERS, check_available
from blt_runtime.errors import BackendError

DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")


def require_webgpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test where there is no device, not even that driver."""
    pytest.importorskip("onnxruntime_ep_webgpu")
    monkeypatch.setenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
    if "VK_ICD_FILENAMES" not in os.environ and DRIVER.exists():
        monkeypatch.setenv("VK_ICD_FILENAMES", str(DRIVER))
    try:
        check_available(load_library("1.32"), PROVIDERS["webgpu"])
    except BackendError as error:
        pytest.skip(str(error))

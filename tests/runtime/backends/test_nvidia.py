"""The NVIDIA side of a machine, on a stand-in for the driver: what is found, and what each fault becomes."""

from __future__ import annotations

import _ctypes
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from blt_runtime.backends.nvidia import (
    Gpu,
    Nvidia,
    _needed,
    check_distributions,
    check_driver,
    check_libraries,
    driver_version,
    needed_libraries,
    probe,
)
from blt_runtime.errors import BackendError

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)
T4 = Gpu("Tesla T4", (7, 5), 15 << 30)


class Driver:
    """libcuda.so.1 and libnvidia-ml.so.1. codes: what functions return instead of 0."""

    def __init__(self, *gpus: Gpu, version: int = 13010, codes: dict[str, int] | None = None) -> None:
        self.gpus, self.version, self.codes = gpus, version, codes or {}

    def __call__(self, name: str) -> Driver:
        assert name in ("libcuda.so.1", "libnvidia-ml.so.1")
        return self

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith(("cu", "nvml")):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            code = self.codes.get(name, 0)
            if not code:
                getattr(self, f"_{name}", lambda *arguments: None)(*arguments)
            return code

        return call

    def _cuDriverGetVersion(self, to: Any) -> None:
        to._obj.value = self.version

    def _cuDeviceGetCount(self, to: Any) -> None:
        to._obj.value = len(self.gpus)

    def _cuDeviceGet(self, to: Any, index: Any) -> None:
        to._obj.value = index.value

    def _cuDeviceGetName(self, to: Any, size: Any, device: Any) -> None:
        to.value = self.gpus[device.value].name.encode()

    def _cuDeviceTotalMem_v2(self, to: Any, device: Any) -> None:
        to._obj.value = self.gpus[device.value].memory

    def _cuDeviceGetAttribute(self, to: Any, attribute: Any, device: Any) -> None:
        to._obj.value = self.gpus[device.value].compute_capability[{75: 0, 76: 1}[attribute.value]]

    def _cuGetErrorName(self, code: Any, to: Any) -> None:
        to._obj.value = b"CUDA_ERROR_UNKNOWN" if code.value == 999 else None

    def _nvmlSystemGetDriverVersion(self, to: Any, size: Any) -> None:
        to.value = b"580.65.06"


def nothing(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


class TestProbe:
    def test_names_the_driver_and_its_gpus(self) -> None:
        assert probe(Driver(H100, T4)) == Nvidia("580.65.06", (13, 1), (H100, T4))

    def test_the_version_of_the_driver_is_optional(self) -> None:
        assert driver_version(nothing) is None
        assert probe(Driver(T4, codes={"nvmlInit_v2": 12})).driver is None
        assert probe(Driver(T4, codes={"nvmlSystemGetDriverVersion": 1})).driver is None

    def test_no_driver(self) -> None:
        with pytest.raises(BackendError, match=r"^no NVIDIA driver: libcuda.so.1 is not installed$"):
            probe(nothing)

    @pytest.mark.parametrize(("gpus", "codes"), [((), {}), ((H100,), {"cuInit": 100})], ids=["count", "init"])
    def test_no_device(self, gpus: tuple[Gpu, ...], codes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(BackendError, match=r"^the NVIDIA driver 580.65.06 finds no GPU$"):
            probe(Driver(*gpus, codes=codes))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        with pytest.raises(BackendError, match=r"finds no GPU \(CUDA_VISIBLE_DEVICES is '7'\)$"):
            probe(Driver(*gpus, codes=codes))

    @pytest.mark.parametrize(
        ("name", "code", "message"),
        [
            ("cuInit", 34, "stub of the CUDA toolkit"),
            ("cuInit", 803, "different versions: restart the machine"),
            ("cuInit", 999, "the NVIDIA driver does not start: CUDA_ERROR_UNKNOWN"),
            ("cuInit", 802, "the NVIDIA driver does not start: error 802"),
            ("cuDeviceGetName", 999, "cuDeviceGetName of the NVIDIA driver failed: CUDA_ERROR_UNKNOWN"),
        ],
    )
    def test_a_driver_that_fails(self, name: str, code: int, message: str) -> None:
        with pytest.raises(BackendError, match=message):
            probe(Driver(H100, codes={name: code}))


class TestChecks:
    def test_two_distributions_of_onnxruntime(self) -> None:
        with pytest.raises(BackendError, match=r"both installed.*pip uninstall -y onnxruntime onnxruntime-gpu, then "):
            check_distributions(lambda name: "1.32.0")

    @pytest.mark.parametrize("missing", ["onnxruntime", "onnxruntime-gpu"])
    def test_one_distribution_of_onnxruntime(self, missing: str) -> None:
        def version(name: str) -> str:
            if name == missing:
                raise metadata.PackageNotFoundError(name)
            return "1.32.0"

        check_distributions(version)

    def test_an_old_driver(self) -> None:
        old = Nvidia("550.54", (12, 4), (H100,))
        message = r"driver 550.54 supports CUDA 12.4, but onnxruntime-gpu 1.31.1 needs CUDA 13: .* \(580 or newer\)$"
        with pytest.raises(BackendError, match=message):
            check_driver(old, "13.0", "onnxruntime-gpu 1.31.1")
        with pytest.raises(
            BackendError, match=r"driver supports CUDA 12.4, but x needs CUDA 99: install a newer driver$"
        ):
            check_driver(Nvidia(None, (12, 4), (H100,)), "99.1", "x")

    @pytest.mark.parametrize("cuda", ["12.9", "13.0", ""], ids=["older", "newer minor", "unknown"])
    def test_a_driver_runs_what_was_built_for_its_major_version(self, cuda: str) -> None:
        check_driver(Nvidia("580.65.06", (13, 0), (H100,)), cuda, "x")

    def test_missing_libraries_are_named(self) -> None:
        message = (
            r"^provider cuda needs libno1.so.9, libno2.so.1, which cannot be loaded: pip install 'blt-runtime\[gpu\]'$"
        )
        with pytest.raises(BackendError, match=message):
            check_libraries(["libno1.so.9", "libc.so.6", "libno2.so.1"], "provider cuda", "gpu")

    def test_libraries_are_loaded_after_those_that_they_need(self) -> None:
        loaded: list[str] = []

        def load(name: str) -> None:
            if name == "libfirst.so" and "libsecond.so" not in loaded:
                raise OSError("libsecond.so: cannot open shared object file")
            loaded.append(name)

        check_libraries(["libfirst.so", "libsecond.so"], "x", "gpu", load)
        assert loaded == ["libsecond.so", "libfirst.so"]


class TestNeeded:
    def test_reads_the_dynamic_section(self, tmp_path: Path) -> None:
        library = tmp_path / "libonnxruntime_providers_cuda.so"
        library.write_bytes(elf("libcudnn.so.9", "libc.so.6", "libnvrtc.so.13"))
        assert needed_libraries(library) == ("libcudnn.so.9", "libnvrtc.so.13")

    def test_reads_a_real_library(self) -> None:
        with Path(_ctypes.__file__).open("rb") as file:
            assert "libc.so.6" in list(_needed(file))

    @pytest.mark.parametrize("content", [b"", b"\x7fELF", b"MZ" * 99, b"\x7fELF\x02\x01" + b"\xff" * 99], ids=range(4))
    def test_a_damaged_library(self, tmp_path: Path, content: bytes) -> None:
        library = tmp_path / "lib.so"
        library.write_bytes(content)
        with pytest.raises(BackendError, match=r"lib.so is missing or damaged: pip install 'blt-runtime\[gpu\]'"):
            needed_libraries(library)


def elf(*names: str) -> bytes:
    """An ELF file that is linked to these libraries, loaded at 0x1000: headers, strings, dynamic section."""
    strings, offsets = b"\0", []
    for name in names:
        offsets.append(len(strings))
        strings += name.encode() + b"\0"
    at = 64 + 2 * 56
    entries = [(5, 0x1000 + at), *((1, offset) for offset in offsets), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    whole = at + len(strings) + len(dynamic)
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<QQIHHH", 64, 0, 0, 64, 56, 2)
    segments = [(1, 4, 0, 0x1000, 0, whole), (2, 4, at + len(strings), 0x1000 + at + len(strings), 0, len(dynamic))]
    packed = b"".join(struct.pack("<IIQQQQ", *segment) + bytes(16) for segment in segments)
    return header.ljust(64, b"\0") + packed + strings + dynamic

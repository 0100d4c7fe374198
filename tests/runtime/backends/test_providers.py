"""Providers of ONNX Runtime on a stand-in for its module: what each needs, what `auto` chooses, how devices fail."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt_runtime import Model
from blt_runtime.backends import nvidia, providers
from blt_runtime.backends.device import DeviceBuffer
from blt_runtime.backends.failures import Failures, failure
from blt_runtime.backends.null import null_spec
from blt_runtime.backends.nvidia import Gpu, Nvidia
from blt_runtime.backends.providers import (
    PROVIDERS,
    Provider,
    cache_folder,
    check_available,
    choose,
    open_session,
    tensorrt_options,
)
from blt_runtime.bundle.manifest import Manifest
from blt_runtime.bundle.spec import GraphSpec, TensorSpec
from blt_runtime.errors import BackendError, MissingExtra, UsageError
from blt_runtime.patching import PatchRule
from tests.runtime.backends.test_nvidia import elf
from tests.runtime.bundles import write_bundle

FOUND = Nvidia("580.65.06", (13, 0), (Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30),))
ALL = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


class Library:
    """onnxruntime-gpu in a folder, whose providers need `needs`."""

    __version__, cuda_version = "1.31.1", "13.0"

    def __init__(self, folder: Path, *available: str, needs: str = "libc.so.6") -> None:
        self.available, self.opened = list(available), dict[str, Any]()
        self.__file__ = str(folder / "__init__.py")
        (folder / "capi").mkdir(parents=True)
        for name in ("cuda", "tensorrt"):
            (folder / f"capi/libonnxruntime_providers_{name}.so").write_bytes(elf(needs))

    def get_available_providers(self) -> list[str]:
        return self.available

    def InferenceSession(self, source: bytes, options: Any, **keywords: Any) -> str:
        self.opened = keywords
        return "session"

    class SessionOptions:
        def add_session_config_entry(self, name: str, value: str) -> None: ...


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100, and one distribution of ONNX Runtime."""
    monkeypatch.setattr(nvidia, "probe", lambda: FOUND)
    monkeypatch.setattr(nvidia, "check_distributions", lambda: None)
    monkeypatch.setattr(providers, "_register_webgpu", missing)


@pytest.fixture
def no_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise BackendError("no NVIDIA driver: libcuda.so.1 is not installed")

    monkeypatch.setattr(nvidia, "probe", probe)


def missing(library: Any) -> None:
    raise MissingExtra("onnxruntime-ep-webgpu", "webgpu")


def missing_but_webgpu(library: Any, provider: Provider) -> None:
    if provider.name != "webgpu":
        raise BackendError("no NVIDIA driver")


def manifest(folder: Path, flavour: str, precision: str) -> Manifest:
    written = write_bundle(folder / "b", null_spec(PatchRule("byte"), entropy=False))
    return Manifest.from_json({**written.to_json(), "flavour": flavour, "precision": precision})


class TestNeeds:
    @pytest.mark.parametrize("name", ["cuda", "tensorrt"])
    @pytest.mark.usefixtures("gpu")
    def test_a_device_with_all_libraries(self, tmp_path: Path, name: str) -> None:
        check_available(Library(tmp_path / "ort", *ALL), PROVIDERS[name])

    @pytest.mark.usefixtures("no_gpu")
    def test_the_driver_comes_first(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match="no NVIDIA driver"):
            check_available(Library(tmp_path / "ort", "CPUExecutionProvider"), PROVIDERS["cuda"])

    @pytest.mark.usefixtures("gpu")
    def test_an_onnxruntime_without_the_provider(self, tmp_path: Path) -> None:
        message = r"no CUDAExecutionProvider, only CPUE.*: pip uninstall -y onnxruntime, then .*'blt-runtime\[gpu\]'$"
        with pytest.raises(BackendError, match=message):
            check_available(Library(tmp_path / "ort", "CPUExecutionProvider"), PROVIDERS["cuda"])

    @pytest.mark.usefixtures("gpu")
    def test_an_old_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nvidia, "probe", lambda: replace(FOUND, cuda=(12, 8)))
        with pytest.raises(BackendError, match=r"supports CUDA 12.8, but onnxruntime-gpu 1.31.1 needs CUDA 13"):
            check_available(Library(tmp_path / "ort", *ALL), PROVIDERS["cuda"])

    @pytest.mark.parametrize(("name", "extra"), [("cuda", "gpu"), ("tensorrt", "ort-trt")])
    @pytest.mark.usefixtures("gpu")
    def test_a_missing_library(self, tmp_path: Path, name: str, extra: str) -> None:
        library = Library(tmp_path / "ort", *ALL, needs="libnvno.so.10")
        with pytest.raises(BackendError, match=rf"provider {name} needs libnvno.so.10, .*\[{extra}\]'$"):
            check_available(library, PROVIDERS[name])


class TestAuto:
    @pytest.mark.parametrize(
        ("flavour", "precision", "want"),
        [
            ("cuda", "bf16", "cuda"),
            ("portable", "bf16", "tensorrt"),
            ("portable", "fp32", "tensorrt"),
            ("portable", "int4", "tensorrt"),
            ("ort", "int8", "cpu"),
        ],
    )
    @pytest.mark.usefixtures("gpu")
    def test_the_first_that_runs_the_bundle(
        self, tmp_path: Path, flavour: str, precision: str, want: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "blt_runtime")
        found = choose(Library(tmp_path / "ort", *ALL), "auto", manifest(tmp_path, flavour, precision), tmp_path)
        assert found.name == want
        assert caplog.text.count(f"provider auto: {want}") == 1

    @pytest.mark.usefixtures("no_gpu")
    def test_the_cpu_is_never_chosen_silently(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        library, given = Library(tmp_path / "ort", *ALL), manifest(tmp_path, "cuda", "fp16")
        assert choose(library, "auto", given, tmp_path).name == "cpu"
        assert caplog.messages == [
            "provider auto: cpu (cuda: no NVIDIA driver: libcuda.so.1 is not installed; "
            "webgpu: onnxruntime-ep-webgpu is not installed: pip install 'blt-runtime[webgpu]')"
        ]

    @pytest.mark.usefixtures("no_gpu")
    def test_batched_graphs_are_not_for_webgpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(providers, "check_available", missing_but_webgpu)
        library, given = Library(tmp_path / "ort", *ALL), manifest(tmp_path, "cuda", "fp16")
        assert choose(library, "auto", given, tmp_path).name == "webgpu"
        assert choose(library, "auto", given, tmp_path, rows=True).name == "cpu"
        assert "webgpu" not in caplog.messages[-1]

    @pytest.mark.usefixtures("no_gpu")
    def test_a_bundle_that_nothing_here_runs(self, tmp_path: Path) -> None:
        library, given = Library(tmp_path / "ort", *ALL), manifest(tmp_path, "cuda", "bf16")
        with pytest.raises(
            BackendError, match=r"no provider runs .* here: cuda: no NVIDIA .*; webgpu: .*; cpu: .* bf16"
        ):
            choose(library, "auto", given, tmp_path)

    @pytest.mark.parametrize(
        ("name", "flavour", "precision", "message"),
        [
            (
                "cuda",
                "cuda",
                "fp32",
                r"provider cuda runs bf16, fp16, int8 and int4: .* --precision bf16",
            ),
            ("tensorrt", "cuda", "bf16", r"tensorrt runs bundles of the flavour portable, .* --flavour portable"),
            ("webgpu", "cuda", "bf16", r"is of bf16, and provider webgpu runs fp32 and fp16"),
            ("cpu", "portable", "bf16", r"is of bf16, which has no kernels on CPUs"),
        ],
    )
    def test_a_named_provider_is_never_replaced(
        self, tmp_path: Path, name: str, flavour: str, precision: str, message: str
    ) -> None:
        with pytest.raises(BackendError, match=message):
            choose(None, name, manifest(tmp_path, flavour, precision), tmp_path)


class TestSessions:
    @pytest.mark.parametrize("name", ["cuda", "tensorrt"])
    def test_onnxruntime_does_not_fall_back(self, tmp_path: Path, name: str) -> None:
        """It would print so on stdout, and run on."""
        library, provider = Library(tmp_path / "ort", *ALL), PROVIDERS[name]
        open_session(library, provider, b"", library.SessionOptions(), False, {"a": "b"})
        (execution, options), cpu = library.opened["providers"]
        assert (execution, cpu, options["a"]) == (provider.execution, "CPUExecutionProvider", "b")
        assert library.opened["enable_fallback"] == 0

    def test_engines_take_all_numbers_of_tokens_up_to_a_chunk(self, tmp_path: Path) -> None:
        spec = replace(null_spec(PatchRule("byte"), entropy=False), chunk=64)
        tensors = TensorSpec("ids", "int64", ("B", "S")), TensorSpec("past_key.0", "float32", (1, 2, 96, 8))
        options = tensorrt_options(GraphSpec("entropy", tensors, (), {}, None), spec, tmp_path)
        assert options["trt_profile_min_shapes"] == options["trt_profile_opt_shapes"] == "ids:1x1"
        assert options["trt_profile_max_shapes"] == "ids:1x64"
        assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)

    def test_engines_of_the_latent_graph_grow_with_its_patches(self, tmp_path: Path) -> None:
        tensors = (TensorSpec("byte_index", "int64", ("B", "P", "L")), TensorSpec("positions", "int64", ("B", "S")))
        spec = null_spec(PatchRule("byte"), entropy=False)
        assert not [
            n for n in tensorrt_options(GraphSpec("latent", tensors, (), {}, None), spec, tmp_path) if "profile" in n
        ]


class TestCache:
    def test_each_bundle_and_graph_has_a_folder_of_the_user(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        folder = cache_folder(None, "ab" * 32, "encoder")
        assert folder == tmp_path / "blt" / "tensorrt" / ("ab" * 16) / "encoder"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert cache_folder(None, "ab" * 32, "encoder") == folder

    def test_a_folder_that_others_can_write_to(self, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        with pytest.raises(BackendError, match=r"holds engines, which are code, and others can write there: chmod 700"):
            cache_folder(tmp_path / "cache", "ab", "encoder")

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BackendError, match=r"cannot keep engines in .*/file/ab/encoder: Not a directory"):
            cache_folder(tmp_path / "file", "ab", "encoder")

    @pytest.mark.parametrize("name", ["cpu", "cuda", "webgpu"])
    def test_other_providers_have_none(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match=f"engine_cache is for the provider tensorrt, not {name}: leave it out"):
            Model.open(tmp_path, provider=name, engine_cache=tmp_path)
        with pytest.raises(UsageError, match="engine_cache is for single streams of a bundle"):
            Model.open(tmp_path, provider="auto", batched=True, engine_cache=tmp_path)


class TestFailures:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 4096", "x: no 4,096 bytes"),
            ("Available memory of 12 is smaller than requested bytes of 2048", "x: no 2,048 bytes"),
            ("CUDA failure 2: out of memory ; GPU=0 ; hostname=a ; expr=cudaMalloc((void**)&p, size);", "x"),
            ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "x"),
            ("std::bad_alloc", "x"),
        ],
    )
    def test_memory(self, text: str, message: str) -> None:
        found = failure("x", RuntimeError(text))
        assert isinstance(found, MemoryError)
        assert str(found) == message

    @pytest.mark.parametrize("code", [700, 719])
    def test_a_device_that_answers_no_more(self, code: int) -> None:
        failures = Failures("cuda")
        failures.check()
        found = failures.of("graph 'latent' failed", RuntimeError(f"CUDA failure {code}: unspecified ; GPU=0\nmore"))
        assert isinstance(found, BackendError)
        assert str(found).endswith("GPU=0: the device answers no more, start the process again")
        with pytest.raises(BackendError, match=f"provider cuda has failed \\(CUDA error {code}\\): start the process"):
            failures.check()

    def test_other_errors_leave_the_device_as_it_was(self) -> None:
        failures = Failures("cuda")
        failures.of("x", RuntimeError("CUDA failure 2: out of memory"))
        failures.of("x", RuntimeError("CUDA failure 1: invalid argument"))
        failures.check()

    def test_a_copy_that_fails(self) -> None:
        """Buffers of a backend share its failures: no copy and no call is tried after the first."""
        calls: list[int] = []

        class Broken:
            class OrtValue:
                ortvalue_from_shape_and_type = ortvalue_from_numpy = staticmethod(lambda *arguments: None)

            def copy_tensors(self, sources: Any, targets: Any) -> None:
                calls.append(1)
                if len(calls) > 1:
                    raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

        buffer = DeviceBuffer(Broken(), "cuda", "float32", (2,), Failures("cuda"))
        with pytest.raises(BackendError, match="a copy of the device cuda failed: CUDA failure 700"):
            buffer.read()
        with pytest.raises(BackendError, match="provider cuda has failed"):
            buffer.write(np.zeros(2, np.float32))
        assert len(calls) == 2

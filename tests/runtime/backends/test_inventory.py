"""What `blt env` reads in processes of their own: a library that crashes, hangs or is missing ends in one line."""

from __future__ import annotations

import sys

import pytest

from blt_runtime.backends import inventory, nvidia
from blt_runtime.backends.nvidia import Gpu, Nvidia


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("import json; print('noise'); print('{\"a\": 1}')", {"a": 1}),
        ("print('null')", None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", {"error": "the process was ended by signal 11"}),
        ("raise RuntimeError('no such symbol')", {"error": "RuntimeError: no such symbol"}),
        ("raise SystemExit(3)", {"error": "exit code 3"}),
    ],
    ids=["answer", "not installed", "crash", "exception", "silence"],
)
def test_another_process_answers(code: str, want: object) -> None:
    assert inventory.ask("gpus", command=python(code)) == want


def test_a_process_that_hangs() -> None:
    assert inventory.ask("gpus", 0.2, python("import time; time.sleep(60)")) == {"error": "no answer in 0.2 s"}


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Nvidia("580.65.06", (13, 0), (Gpu("Tesla T4", (7, 5), 15 << 30),))
    monkeypatch.setattr(nvidia, "probe", lambda: found)
    assert inventory.gpus() == {
        "driver": "580.65.06",
        "cuda": "13.0",
        "gpus": [{"name": "Tesla T4", "compute_capability": "7.5", "memory_bytes": 15 << 30}],
    }


def test_onnxruntime_lists_its_devices() -> None:
    pytest.importorskip("onnxruntime")
    found = inventory.ask("onnxruntime")
    assert found is not None
    assert "CPUExecutionProvider" in found["providers"]
    assert {"cpu"} <= {device["type"] for device in found["devices"]}


def test_libraries_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_load", lambda names: None)
    assert inventory.libraries() == {"cuda": None, "cudnn": None, "tensorrt": None}


def test_versions_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def cudaRuntimeGetVersion(self, to: object) -> int:
            to._obj.value = 13010  # type: ignore[attr-defined]
            return 0

    class Cudnn:
        class cudnnGetVersion:
            def __new__(cls) -> int:  # type: ignore[misc]
                return 91002

    class Infer:
        def getInferLibVersion(self) -> int:
            return 101304

    found = {inventory.CUDART: Cuda(), inventory.CUDNN: Cudnn(), inventory.NVINFER: Infer()}
    monkeypatch.setattr(inventory, "_load", found.__getitem__)
    assert inventory.libraries() == {"cuda": "13.1", "cudnn": "9.10.2", "tensorrt": "10.13.4"}

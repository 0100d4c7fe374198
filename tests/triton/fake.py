"""Triton's side of `model.py`: a module `triton_python_backend_utils`, requests, and a model on the null backend."""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from blt_runtime import Model
from blt_runtime.backends.null import null_spec
from tests.runtime.bundles import edit, write_bundle
from tests.runtime.streams import model_of

CAPACITY = 300
SPEC = null_spec(local_kind="window", capacity_bytes=CAPACITY, capacity_patches=CAPACITY)
FINAL = 1
KINDS = {
    "PROMPT": np.object_, "INPUT_IDS": np.int32, "MAX_TOKENS": np.int32, "TEMPERATURE": np.float32, "TOP_P": np.float32,
    "TOP_K": np.int32, "MIN_P": np.float32, "SEED": np.int64, "STOP": np.object_, "IGNORE_EOS": np.bool_,
    "STREAM": np.bool_,
}  # fmt: skip


misused: list[str] = []
"""What a server would not have survived: calls at the same time, and calls about a request after its last response."""
_inside = threading.Lock()


@contextmanager
def entered(call: str) -> Iterator[None]:
    """The server during a call, which takes a moment."""
    if not _inside.acquire(blocking=False):
        misused.append(f"{call} during another call")
        yield
        return
    try:
        time.sleep(0.0001)
        yield
    finally:
        _inside.release()


class TritonModelException(Exception):
    pass


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "internal", "invalid", "unavailable", "cancelled"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = message, code


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor]
    error: TritonError | None = None

    def __getitem__(self, name: str) -> Any:
        """The list of ids, or the one value of another output."""
        (array,) = (tensor.array for tensor in self.output_tensors if tensor.name == name)
        assert array.ndim == 1
        values = [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]
        return values if name == "OUTPUT_IDS" else values[0]


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels, self.value, self.ended = labels, 0.0, False

    def __del__(self) -> None:
        if self.ended:
            misused.append("a family ended before its metric")

    def increment(self, value: float) -> None:
        with entered("increment"):
            assert not self.ended
            self.value += value

    def set(self, value: float) -> None:
        with entered("set"):
            assert not self.ended
            self.value = value


class MetricFamily:
    """The newest metrics by their names in `all`. As in the server, they end with their family."""

    COUNTER, GAUGE = 0, 1
    all: ClassVar[weakref.WeakValueDictionary[str, Metric]] = weakref.WeakValueDictionary()
    off = False

    def __init__(self, name: str, description: str, kind: int) -> None:
        if self.off:
            raise TritonModelException("metrics are off")
        self.name, self.made = name, weakref.WeakSet[Metric]()

    def Metric(self, labels: dict[str, str]) -> Metric:
        self.all[self.name] = made = Metric(labels)
        self.made.add(made)
        return made

    def __del__(self) -> None:
        for metric in self.__dict__.get("made", ()):
            metric.ended = True


class Sender:
    """Responses in the order in which they were sent. seconds: how long the server takes for one."""

    def __init__(self) -> None:
        self.sent: queue.Queue[tuple[InferenceResponse, int]] = queue.Queue()
        self.cancelled = self.ended = self.gone = False
        self.seconds = 0.0

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        with self._known("send"):
            time.sleep(self.seconds)
            self.ended = flags == FINAL
            if self.gone:
                raise TritonModelException("the client is gone")
            self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        with self._known("is_cancelled"):
            return self.cancelled

    @contextmanager
    def _known(self, call: str) -> Iterator[None]:
        if self.ended:
            misused.append(f"{call} after the last response")
        with entered(call):
            yield


@dataclass
class Request:
    """`Request.of(PROMPT="Once", MAX_TOKENS=5)` with the types of config.pbtxt."""

    inputs: dict[str, Tensor]
    sender: Sender = field(default_factory=Sender)

    @classmethod
    def of(cls, **inputs: Any) -> Request:
        made = {}
        for name, value in inputs.items():
            values = value if isinstance(value, list) else [value]
            encoded = [v.encode() if isinstance(v, str) else v for v in values]
            made[name] = Tensor(name, np.array(encoded, KINDS[name]))
        return cls(made)

    def get_response_sender(self) -> Sender:
        with entered("get_response_sender"):
            return self.sender

    def responses(self) -> list[InferenceResponse]:
        """All responses; waits for the last one."""
        found = []
        while True:
            response, flags = self.sender.sent.get(timeout=60)
            found.append(response)
            if flags == FINAL:
                return found

    def only(self) -> InferenceResponse:
        (response,) = self.responses()
        return response

    def error(self) -> TritonError:
        """The error of a request that must fail."""
        response = self.responses()[-1]
        assert response.error is not None
        assert "\n" not in response.error.message
        return response.error

    def ids(self) -> list[int]:
        return [id for response in self.responses() for id in response["OUTPUT_IDS"]]


class Logger:
    lines: ClassVar[list[str]] = []
    log_error = log_warn = log_verbose = lines.append


def utils() -> ModuleType:
    made = ModuleType("triton_python_backend_utils")
    made.__dict__.update(
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        TritonError=TritonError,
        TritonModelException=TritonModelException,
        MetricFamily=MetricFamily,
        Logger=Logger,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    return made


def bundle(folder: Path) -> Path:
    """A bundle of the null model with batched graphs in name only; `model.py` opens the null backend in its place."""
    manifest = write_bundle(folder, SPEC)
    edit(folder, row_graphs={name: {"file": ref.file} for name, ref in manifest.graphs.items()})
    return folder


def program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`model.py` of a written model, imported as the Python backend does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils())
    spec = importlib.util.spec_from_file_location("triton_model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> Any:
    """A written model, initialized on the null backend with these parameters of config.pbtxt."""
    module = program(folder, monkeypatch)
    monkeypatch.setattr(Model, "open", lambda path, **_: model_of(SPEC))
    made = module.TritonPythonModel()
    made.initialize(arguments(**settings))
    return made


def arguments(**settings: str) -> dict[str, str]:
    """What `initialize` gets."""
    parameters = {name: {"string_value": value} for name, value in settings.items()}
    return {"model_name": "tiny", "model_version": "1", "model_config": json.dumps({"parameters": parameters})}


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)

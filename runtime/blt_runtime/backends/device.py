"""Sessions of ONNX Runtime on a device with memory of its own.

ONNX Runtime copies an input to where its consumer runs once, when it is bound. An input that is bound in another place
and written afterwards would go stale without an error. So every tensor is bound where
`session.get_input_memory_infos()` says. Inputs in main memory whose consumer is on the device are copied before each
call, results after it. Caches stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bundle.spec import GraphSpec
from ..errors import BackendError
from .protocol import Array, Buffer, Call, HostBuffer, Part


class DeviceBuffer:
    """Memory of a device that only graphs read and write. `value` is its OrtValue."""

    def __init__(self, library: Any, device: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._library, self._device = library, device
        self.value = new_value(library, device, self.dtype, shape)
        self.write(np.zeros(shape, self.dtype))

    @property
    def array(self) -> Array:
        raise BackendError(f"memory of the device {self._device} has no view on the host")

    def part(self, start: int, shape: tuple[int, ...]) -> DeviceBuffer:
        raise BackendError(f"batched streams run on the CPU only: memory of the device {self._device} has no parts")

    def read(self, part: Part = ()) -> Array:
        return np.array(self.value.numpy()[part])

    def write(self, array: Array, part: Part = ()) -> None:
        whole = array
        if part or array.shape != self.shape:
            whole = self.read()
            whole[part] = array
        source = self._library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(whole, self.dtype))
        self._library.copy_tensors([source], [self.value])


def new_value(library: Any, device: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """An OrtValue on the device, with undefined contents. Raises MemoryError."""
    try:
        return library.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype.type, device, 0)
    except Exception as error:  # onnxruntime's own classes share no public base
        raise MemoryError(f"no {math.prod(shape) * dtype.itemsize:,} bytes on the device {device}") from error


class Transfers:
    """Binds the tensors of one call, and copies those that the host writes or reads."""

    def __init__(self, library: Any, device: str, session: Any, spec: GraphSpec) -> None:
        self._library, self._device, self._session, self._spec = library, device, session, spec
        self._inputs = _places(session.get_inputs(), session.get_input_memory_infos())
        self._outputs = _places(session.get_outputs(), session.get_output_memory_infos())

    def bind(self, buffers: Mapping[str, Buffer]) -> tuple[Any, Call, Call]:
        """The binding, and what to do before and after a call."""
        binding = self._session.io_binding()
        up, down = _Copies(self._library), _Copies(self._library)
        for name, on_device in self._inputs.items():
            buffer = buffers[name]
            if on_device:
                binding.bind_ortvalue_input(name, self._value(name, buffer, up.to_device))
            else:
                array = self._host_array(name, buffer)
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, on_device in self._outputs.items():
            buffer = buffers[name]
            if on_device or isinstance(buffer, DeviceBuffer):
                binding.bind_ortvalue_output(name, self._value(name, buffer, down.to_host))
            else:
                array = self._host_array(name, buffer)
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding, up.run, down.run

    def _value(self, name: str, buffer: Buffer, copied: Any) -> Any:
        """The OrtValue to bind. That of a host buffer is new, and copied with each call."""
        if isinstance(buffer, DeviceBuffer):
            return buffer.value
        value = new_value(self._library, self._device, buffer.dtype, buffer.shape)
        copied(self._host_array(name, buffer), value)
        return value

    def _host_array(self, name: str, buffer: Buffer) -> Array:
        if not isinstance(buffer, HostBuffer):
            raise BackendError(f"graph {self._spec.name!r} reads {name!r} on the CPU, and it is on a device")
        return buffer.array


class _Copies:
    """Copies between main memory and the device, all in one call."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._sources: list[Any] = []
        self._targets: list[Any] = []

    def to_device(self, array: Array, value: Any) -> None:
        self._sources.append(self._library.OrtValue.ortvalue_from_numpy(array))
        self._targets.append(value)

    def to_host(self, array: Array, value: Any) -> None:
        self._sources.append(value)
        self._targets.append(self._library.OrtValue.ortvalue_from_numpy(array))

    def run(self) -> None:
        if self._sources:
            self._library.copy_tensors(self._sources, self._targets)


def _places(tensors: Any, infos: Any) -> dict[str, bool]:
    """Whether each tensor is on the device, by name."""
    return {tensor.name: "cpu" not in info.name.lower() for tensor, info in zip(tensors, infos, strict=True)}

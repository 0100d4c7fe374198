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
from .blocks import Block, BlockBuffer
from .counts import Counts
from .failures import Failures
from .protocol import Array, Buffer, HostBuffer, OpaqueBuffer

NO_CAPTURE = -1
BFLOAT16 = 16
"""The element type's number in ONNX; numpy has none."""


class DeviceBuffer(OpaqueBuffer):
    """Memory of a device that only graphs read and write; zeroed. `value` is its OrtValue."""

    def __init__(
        self,
        library: Any,
        device: str,
        dtype: str,
        shape: tuple[int, ...],
        failures: Failures | None = None,
        counts: Counts | None = None,
    ) -> None:
        super().__init__(device, dtype, shape)
        self._counts = counts or Counts()
        self._library, self.element = library, element_type(dtype)
        self._failures = failures or Failures(device)
        self.value = new_value(library, device, self.element, shape)
        self.copy_in(np.zeros(shape, self.dtype))

    def copy_out(self, whole: Array) -> None:
        self._copy(self.value, host_value(self._library, whole, self.element))
        self._counts.add(copies=1, waits=1)

    def copy_in(self, whole: Array) -> None:
        self._copy(host_value(self._library, whole, self.element), self.value)
        self._counts.add(copies=1)

    def _copy(self, source: Any, target: Any) -> None:
        self._failures.check()
        try:
            self._library.copy_tensors([source], [target])
        except Exception as error:  # onnxruntime's own classes share no public base
            raise self._failures.of(f"a copy of the device {self.device} failed", error) from error


def element_type(dtype: str) -> Any:
    """An element type as ONNX Runtime's bindings take it: numpy's, or the number of ONNX for bfloat16."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def new_value(library: Any, device: str, element: Any, shape: tuple[int, ...]) -> Any:
    """An OrtValue on the device, with undefined contents. Raises MemoryError."""
    try:
        return library.OrtValue.ortvalue_from_shape_and_type(list(shape), element, device, 0)
    except Exception as error:  # onnxruntime's own classes share no public base
        size = math.prod(shape) * (2 if element == BFLOAT16 else np.dtype(element).itemsize)
        raise MemoryError(f"no {size:,} bytes on the device {device}") from error


def host_value(library: Any, array: Array, element: Any) -> Any:
    """An OrtValue over the memory of an array."""
    if element == BFLOAT16:
        return library.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return library.OrtValue.ortvalue_from_numpy(array)


class StepBuffer(HostBuffer):
    """A host buffer of a decode step: calls on such buffers alone are made again and again, so they are captured."""


class DeviceBlock(Block):
    """A block whose twin is an OrtValue, on a device with addresses."""

    def __init__(self, library: Any, device: str, size: int) -> None:
        super().__init__(HostBuffer("uint8", (size,)).array, 0)
        self.host = host_value(library, self.bytes, np.uint8)
        self.value = new_value(library, device, np.uint8, (size,))
        self.address = int(self.value.data_ptr())
        library.copy_tensors([self.host], [self.value])


class Transfers:
    """Binds the tensors of one call, and copies those that the host writes or reads."""

    def __init__(self, library: Any, device: str, session: Any, spec: GraphSpec) -> None:
        self._library, self._device, self._session, self._spec = library, device, session, spec
        self._inputs = _places(session.get_inputs(), session.get_input_memory_infos())
        self._outputs = _places(session.get_outputs(), session.get_output_memory_infos())

    def twins(self, buffers: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """New buffers of the same places and shapes. Names that share a buffer share its twin."""
        made: dict[int, Buffer] = {}
        for name, buffer in buffers.items():
            dtype = self._spec.tensor(name).dtype
            if id(buffer) not in made and isinstance(buffer, DeviceBuffer):
                made[id(buffer)] = DeviceBuffer(self._library, self._device, dtype, buffer.shape)
            elif id(buffer) not in made:
                made[id(buffer)] = HostBuffer(dtype, buffer.shape)
        return {name: made[id(buffer)] for name, buffer in buffers.items()}

    def run_options(self, capture: int) -> Any:
        """Options of a run: the number of its captured graph, or NO_CAPTURE."""
        options = self._library.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(capture))
        return options

    def bind(self, buffers: Mapping[str, Buffer], capture: bool = False) -> tuple[Any, Copies, Copies]:
        """The binding, and the copies before and after a call.

        capture: a captured call has all inputs on the device, those that no node reads too, which the session places in
        main memory (the positions of an entropy model without layers). An input that a node reads in main memory would
        go stale; the probe finds that.
        """
        binding = self._session.io_binding()
        up, down = Copies(self._library), Copies(self._library)
        for name, on_device in self._inputs.items():
            binds = binding.bind_input, binding.bind_ortvalue_input
            self._bind(name, buffers[name], on_device or capture, binds, up, up.to_device)
        for name, on_device in self._outputs.items():
            binds = binding.bind_output, binding.bind_ortvalue_output
            on_device = on_device or isinstance(buffers[name], DeviceBuffer)
            self._bind(name, buffers[name], on_device, binds, down, down.to_host)
        return binding, up, down

    def _bind(
        self, name: str, buffer: Buffer, on_device: bool, binds: tuple[Any, Any], copies: Copies, copied: Any
    ) -> None:
        """Binds a tensor by `binds`, at an address or as an OrtValue. copied: adds a copy for each call to `copies`."""
        at_address, as_value = binds
        if on_device and isinstance(buffer, BlockBuffer):
            copies.block(buffer.block, copied)
            at_address(name, self._device, 0, self._element(name), buffer.shape, buffer.address)
        elif on_device:
            as_value(name, self._value(name, buffer, copied))
        else:
            array = self._host_array(name, buffer)
            at_address(name, "cpu", 0, self._element(name), array.shape, array.ctypes.data)

    def _value(self, name: str, buffer: Buffer, copied: Any) -> Any:
        """The OrtValue to bind. That of a host buffer is new, and copied with each call."""
        if isinstance(buffer, DeviceBuffer):
            return buffer.value
        value = new_value(self._library, self._device, self._element(name), buffer.shape)
        copied(host_value(self._library, self._host_array(name, buffer), self._element(name)), value)
        return value

    def _element(self, name: str) -> Any:
        return element_type(self._spec.tensor(name).dtype)

    def _host_array(self, name: str, buffer: Buffer) -> Array:
        if not isinstance(buffer, HostBuffer):
            raise BackendError(f"graph {self._spec.name!r} reads {name!r} on the CPU, and it is on a device")
        return buffer.array


class Copies:
    """Copies between main memory and the device, all in one call. `len` is their number."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._sources: list[Any] = []
        self._targets: list[Any] = []
        self._blocks: set[Block] = set()

    def block(self, block: Block, copied: Any) -> None:
        """A block, once."""
        if block not in self._blocks and isinstance(block, DeviceBlock):
            copied(block.host, block.value)
        self._blocks.add(block)

    def to_device(self, host: Any, value: Any) -> None:
        self._sources.append(host)
        self._targets.append(value)

    def to_host(self, host: Any, value: Any) -> None:
        self._sources.append(value)
        self._targets.append(host)

    def __len__(self) -> int:
        return len(self._sources)

    def run(self) -> None:
        if self._sources:
            self._library.copy_tensors(self._sources, self._targets)


def _places(tensors: Any, infos: Any) -> dict[str, bool]:
    """Whether each tensor is on the device, by name."""
    return {tensor.name: "cpu" not in info.name.lower() for tensor, info in zip(tensors, infos, strict=True)}

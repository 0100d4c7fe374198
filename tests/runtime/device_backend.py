"""The null backend as a device with memory of its own: its graphs see what was copied, never what the host holds."""

from __future__ import annotations

from collections.abc import Mapping

from blt_runtime.backends.null import NullBackend, NullSession
from blt_runtime.backends.protocol import Array, Buffer, Call, HostBuffer, Part, Place
from blt_runtime.errors import BackendError


class FarBuffer:
    """Memory that only graphs read and write."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.far = HostBuffer(dtype, shape)
        self.shape, self.dtype = shape, self.far.dtype

    @property
    def array(self) -> Array:
        raise BackendError("no view on the host")

    def part(self, start: int, shape: tuple[int, ...]) -> FarBuffer:
        raise BackendError("no parts")

    def read(self, part: Part = ()) -> Array:
        return self.far.read(part)

    def write(self, array: Array, part: Part = ()) -> None:
        self.far.write(array, part)


class FarBackend(NullBackend):
    """Copies the host's buffers in before a call and out after it; caches stay."""

    def session(self, group: str) -> FarSession:
        return FarSession(self, self.spec.graphs[group])

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:  # type: ignore[override]
        return FarBuffer(dtype, shape) if place == "device" else HostBuffer(dtype, shape)


class FarSession(NullSession):
    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        near = {name: buffer for name, buffer in buffers.items() if isinstance(buffer, HostBuffer)}
        far = {name: buffer.far for name, buffer in buffers.items() if isinstance(buffer, FarBuffer)}
        cached = {*self.spec.aliases, *self.spec.aliases.values()}
        kept = {"byte_states", "patch_kv"} & set(buffers) if self._backend.spec.resident else set()
        assert set(far) == cached | kept
        copies = {name: HostBuffer(buffer.dtype, buffer.shape) for name, buffer in near.items()}
        run = super().bind({**copies, **far})
        inputs = {tensor.name for tensor in self.spec.inputs}

        def call() -> None:
            for name, copy in copies.items():
                if name in inputs:
                    copy.write(near[name].array)
            run()
            for name, copy in copies.items():
                if name not in inputs:
                    near[name].write(copy.array)

        return call

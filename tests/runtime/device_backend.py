"""The null backend as a device with memory of its own: its graphs see what was copied, never what the host holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

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
    def bind(self, buffers: Mapping[str, Buffer]) -> FarCall:
        near = {name: buffer for name, buffer in buffers.items() if isinstance(buffer, HostBuffer)}
        far = {name: buffer.far for name, buffer in buffers.items() if isinstance(buffer, FarBuffer)}
        cached = {*self.spec.aliases, *self.spec.aliases.values()}
        kept = {"byte_states", "patch_kv"} & set(buffers) if self._backend.spec.resident else set()
        assert set(far) == cached | kept
        copies = {name: HostBuffer(buffer.dtype, buffer.shape) for name, buffer in near.items()}
        inputs = {tensor.name for tensor in self.spec.inputs}
        return FarCall(
            [(near[name], copy) for name, copy in copies.items() if name in inputs],
            super().bind({**copies, **far}),
            [(copy, near[name]) for name, copy in copies.items() if name not in inputs],
        )


class FarCall:
    """Inputs go up, the graph runs, results come down."""

    def __init__(self, up: list[tuple[Buffer, Buffer]], run: Call, down: list[tuple[Buffer, Buffer]]) -> None:
        self.up, self.run, self.down = up, run, down

    def __call__(self) -> None:
        _copy(self.up)
        self.run()
        _copy(self.down)


def _copy(pairs: list[tuple[Buffer, Buffer]]) -> None:
    for source, target in pairs:
        target.write(source.array)


class ComposingFarBackend(FarBackend):
    """Also runs chains of calls: their inputs go up before all of them, and their results come down after all. The last
    chain runs first, since nothing may depend on the order of chains."""

    def compose(self, chains: Sequence[Sequence[Call]]) -> Call:
        calls = [cast(FarCall, call) for chain in reversed(chains) for call in chain]

        def run() -> None:
            for call in calls:
                _copy(call.up)
            for call in calls:
                call.run()
            for call in calls:
                _copy(call.down)

        return run

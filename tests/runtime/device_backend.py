"""The null backend as a device with memory of its own: its graphs see what was copied, never what the host holds.

Also the comparison of a device's streams with those of the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from blt_runtime import Model, Stream
from blt_runtime.backends.null import NullBackend, NullSession
from blt_runtime.backends.protocol import Array, Buffer, Call, HostBuffer, Part, Place
from blt_runtime.errors import BackendError
from blt_runtime.ids import EOS, encode

IDS = np.concatenate([encode("Grüße\naus 東京", bos=True), [EOS], encode("def f(x):\n  return", bos=False)])
"""Text that ends a document and lines."""


def assert_streams_equal(model: Model, want: Stream, n: int) -> None:
    """The model reads and generates what `want` does, a new stream: chunks, steps, a rewind, a snapshot, drafts."""
    stream, other = model.stream(bos=False), model.stream(bos=False)
    for ids in (IDS[:1], IDS[1:20], IDS[20:21], IDS[21:]):
        for some in (want, stream):
            some.append_ids(ids)
        np.testing.assert_allclose(stream.logits, want.logits, atol=2e-5)
    np.testing.assert_array_equal(stream.patch_lengths, want.patch_lengths)
    kept = stream.snapshot()
    made = list(want.generate_ids(n, temperature=0.0, stop_at_eos=False))
    assert list(stream.generate_ids(n, temperature=0.0, stop_at_eos=False)) == made
    stream.rewind(n)
    assert list(stream.generate_ids(n, temperature=0.0, stop_at_eos=False)) == made
    other.restore(kept)
    assert list(other.generate_ids(n, temperature=0.0, stop_at_eos=False)) == made
    np.testing.assert_allclose(other.logits, want.logits, atol=2e-5)


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

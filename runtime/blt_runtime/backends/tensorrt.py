"""TensorRT engines: one for each graph, on buffers bound by address.

Nothing here imports TensorRT or CUDA: both come as arguments (`trt`, `device`), so that tests run everything on a
stand-in.

A call sets shapes and addresses of a context, requests the upload of its inputs, the engine and the download of its
results on one stream, and waits once. Buffers of decode steps are parts of two blocks of pinned memory, inputs and
results, with a twin on the device, so that each call moves one range up and one down. A composition (`compose`) is one
captured graph over several calls.

Contexts: calls share one context for each profile, under a lock, since only one of them is on the way at a time.
A captured call has a context of its own, because a captured graph is undefined once its context has changed.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.engines import Engine
from ..bundle.spec import GraphSpec, ModelSpec, padded_spec
from ..errors import BackendError, UsageError
from .blocks import Block, BlockBuffer, Blocks
from .counts import Counts
from .cuda_device import Device
from .probe import PROBES, differ, input_values
from .protocol import Array, Buffer, Call, HostBuffer, OpaqueBuffer, Place, storage

log = logging.getLogger("blt_runtime")
BLOCK = 1 << 16
"""Bytes of the blocks that buffers of decode steps are parts of."""


class DeviceMemory(OpaqueBuffer):
    """Memory of the device that only graphs read and write; zeroed. Freed with this object."""

    def __init__(self, owner: TensorRtBackend, dtype: str, shape: tuple[int, ...]) -> None:
        super().__init__(owner.device.name, dtype, shape)
        self._owner = owner
        self.address = _alloc(owner.device, self, math.prod(shape) * self.dtype.itemsize)
        self.copy_in(np.zeros(shape, self.dtype))

    def copy_out(self, whole: Array) -> None:
        with self._owner.lock:
            self._owner.device.download(whole, self.address, self._owner.stream)
            self._owner.device.wait(self._owner.stream)
        self._owner.counts.add(copies=1, waits=1)

    def copy_in(self, whole: Array) -> None:
        with self._owner.lock:
            self._owner.device.upload(self.address, whole, self._owner.stream)
            self._owner.device.wait(self._owner.stream)
        self._owner.counts.add(copies=1, waits=1)


class PinnedBlock(Block):
    """A block of pinned memory."""

    def __init__(self, owner: TensorRtBackend, size: int) -> None:
        device = owner.device
        super().__init__(device.pinned(size), 0)
        weakref.finalize(self, device.unpin, self.bytes)
        self.address = _alloc(device, self, size)
        with owner.lock:
            device.upload(self.address, self.bytes, owner.stream)
            device.wait(owner.stream)


class TensorRtBackend:
    """Runs the engines of a model.

    plans: serialised engines by graph, built for this version of TensorRT and this device; `Engine` for those without
    weights, which are put in. trt: the module tensorrt. strict: raise BackendError instead of a warning where a
    captured call does not replay what it computes.

    Raises BackendError for a plan that TensorRT refuses, or whose weights it does not get, and for an engine whose
    tensors or caches are not those of the specification.
    """

    name = "tensorrt"

    def __init__(
        self, spec: ModelSpec, plans: Mapping[str, bytes | Engine], trt: Any, device: Device, *, strict: bool = False
    ) -> None:
        self.spec, self.trt, self.device, self.strict = spec, trt, device, strict
        self.lock, self.stream, self.counts = threading.RLock(), device.stream(), Counts()
        self._blocks = Blocks(BLOCK, partial(PinnedBlock, weakref.proxy(self)))
        self.replays_well: dict[Hashable, bool] = {}
        trt_log = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(trt_log)
        self._sessions = {
            name: EngineSession(self, self._form(graph), runtime, trt_log, plans[name])
            for name, graph in spec.graphs.items()
        }

    @staticmethod
    def _form(graph: GraphSpec) -> GraphSpec:
        """What the engine of a graph runs."""
        return graph

    def session(self, group: str) -> EngineSession:
        return self._sessions[group]

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        if place == "host":
            return HostBuffer(dtype, shape)
        if place == "device":
            return DeviceMemory(self, dtype, shape)
        return self._blocks.buffer(dtype, shape, place)

    def compose(self, chains: Sequence[Sequence[Call]]) -> Call:
        calls = [[call for call in chain if isinstance(call, EngineCall)] for chain in chains]
        if sum(map(len, calls)) != sum(map(len, chains)) or not all(calls):
            raise BackendError("only calls of TensorRT engines can be composed")
        if any(call.has_twins for chain in calls for call in chain):
            raise BackendError("calls on host buffers cannot be composed: each has a copy of its own on the device")
        return Composition(self, calls)


class TensorRtRows(TensorRtBackend):
    """Runs the engines of padded graphs (`PaddedBackend`), and only those: `session` raises UsageError. `rows` is what
    the engines were built for. Raises BackendError also if that differs between engines or profiles."""

    def __init__(
        self, spec: ModelSpec, plans: Mapping[str, bytes | Engine], trt: Any, device: Device, *, strict: bool = False
    ) -> None:
        super().__init__(spec, plans, trt, device, strict=strict)
        found = sorted(set[int]().union(*(session.batches() for session in self._sessions.values())))
        if len(found) != 1:
            raise BackendError(f"the engines are for {found} streams at a time, not for one number: run blt build")
        self.rows = found[0]

    @staticmethod
    def _form(graph: GraphSpec) -> GraphSpec:
        return padded_spec(graph)

    def padded_session(self, group: str) -> EngineSession:
        return self._sessions[group]

    def session(self, group: str) -> EngineSession:
        raise UsageError("these engines run batched streams: use a Scheduler, or open those of single streams")


class EngineSession:
    """One engine, checked against its specification when it is opened."""

    def __init__(
        self, backend: TensorRtBackend, spec: GraphSpec, runtime: Any, trt_log: Any, plan: bytes | Engine
    ) -> None:
        self.spec, self.backend = spec, backend
        plan = plan if isinstance(plan, Engine) else Engine(plan)
        self.engine = runtime.deserialize_cuda_engine(plan.plan)
        if self.engine is None:
            raise BackendError(
                f"TensorRT {getattr(backend.trt, '__version__', '?')} refuses the engine of the graph {spec.name!r}: "
                "it was built by another version or for another GPU; run blt build"
            )
        self.layers: int | None = getattr(self.engine, "num_layers", None)
        self._shared: dict[int, Any] = {}
        self._check_tensors()
        if plan.graph is not None:
            self._put_weights(trt_log, *plan.graph)

    def _put_weights(self, trt_log: Any, graph: bytes, path: Path) -> None:
        """Puts the weights of an ONNX graph into an engine that was built without. They are those of the build, because
        TensorRT has chosen its kernels for them (REFIT_IDENTICAL)."""
        refitter = self.backend.trt.Refitter(self.engine, trt_log)
        parser = self.backend.trt.OnnxParserRefitter(refitter, trt_log)
        if parser.refit_from_bytes(graph, str(path)) and refitter.refit_cuda_engine():
            return
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        if missing := list(refitter.get_missing_weights()):
            reasons.append(f"{len(missing)} are missing, such as {missing[0] or 'one without a name'}")
        raise BackendError(
            f"TensorRT does not put the weights into the engine of the graph {self.spec.name!r} "
            f"({'; '.join(reasons) or 'no reason given'}): run blt build without --strip"
        )

    def _check_tensors(self) -> None:
        engine, spec, trt = self.engine, self.spec, self.backend.trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        wanted = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
        if missing := sorted(set(wanted) ^ set(names)):
            raise BackendError(f"the engine of the graph {spec.name!r} has other tensors: {', '.join(missing[:4])}")
        types = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
        for name, tensor in wanted.items():
            found = engine.get_tensor_dtype(name)
            if found != getattr(trt.DataType, types[tensor.dtype]):
                raise BackendError(f"the engine of the graph {spec.name!r} has {name!r} as {found}, not {tensor.dtype}")
            source = engine.get_aliased_input_tensor(name) if name not in {t.name for t in spec.inputs} else None
            if (source or None) != spec.aliases.get(name):
                raise BackendError(
                    f"the engine of the graph {spec.name!r} does not write {name!r} into {spec.aliases.get(name)!r}"
                )

    def bind(self, buffers: Mapping[str, Buffer]) -> EngineCall:
        return EngineCall(self, buffers)

    def profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that takes the shapes. Raises BackendError."""
        for number in range(self.engine.num_optimization_profiles):
            ranges = {name: self.engine.get_tensor_profile_shape(name, number) for name in shapes}
            if all(_within(shape, ranges[name]) for name, shape in shapes.items()):
                return number
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name in self._varying())
        raise BackendError(f"the engine of the graph {self.spec.name!r} has no profile for {listed}: run blt build")

    def batches(self) -> set[int]:
        """The numbers of rows that its profiles take."""
        profiles = range(self.engine.num_optimization_profiles)
        ranges = [self.engine.get_tensor_profile_shape("positions", number) for number in profiles]
        return {limit[0] for least, _, most in ranges for limit in (least, most)}

    def _varying(self) -> set[str]:
        return {t.name for t in self.spec.inputs if not all(isinstance(size, int) for size in t.shape)}

    def shared_context(self, profile: int) -> Any:
        if profile not in self._shared:
            self._shared[profile] = self.new_context(profile)
        return self._shared[profile]

    def new_context(self, profile: int) -> Any:
        context = self.engine.create_execution_context()
        if context is None:
            raise MemoryError(f"no memory for a context of the graph {self.spec.name!r}")
        if not context.set_optimization_profile_async(profile, self.backend.stream):
            raise BackendError(f"TensorRT cannot select profile {profile} of the graph {self.spec.name!r}")
        return context


class EngineCall:
    """A graph on exactly these buffers."""

    def __init__(self, session: EngineSession, buffers: Mapping[str, Buffer]) -> None:
        self.session, self.buffers = session, dict(buffers)
        self._twins: dict[int, DeviceMemory] = {}
        spec = session.spec
        _check_bound(spec, buffers)
        self._shapes = {t.name: buffers[t.name].shape for t in spec.inputs}
        self.profile = session.profile(self._shapes)
        self.inputs = [buffers[t.name] for t in spec.inputs]
        self.outputs = [buffers[t.name] for t in spec.outputs if t.name not in spec.aliases]
        self._addresses = {name: self._address(name, buffer) for name, buffer in buffers.items()}
        self._ups, self._downs = self._transfers(self.inputs), self._transfers(self.outputs)

    @property
    def has_twins(self) -> bool:
        return bool(self._twins)

    @property
    def shapes(self) -> Hashable:
        """The graph and the shapes of its inputs."""
        return self.session.spec.name, tuple(self._shapes.items())

    def _address(self, name: str, buffer: Buffer) -> int:
        """Where the engine reads or writes the tensor. A host buffer has a twin, made here."""
        if isinstance(buffer, DeviceMemory | BlockBuffer):
            return buffer.address
        if id(buffer) not in self._twins:
            dtype = self.session.spec.tensor(name).dtype
            self._twins[id(buffer)] = DeviceMemory(self.session.backend, dtype, buffer.shape)
        return self._twins[id(buffer)].address

    def _transfers(self, buffers: Sequence[Buffer]) -> list[tuple[Array, int]]:
        """Host arrays and addresses of their twins: each host buffer, and one range of each block."""
        twins = [(id(buffer), buffer) for buffer in buffers if id(buffer) in self._twins]
        return [*((buffer.array, self._twins[of].address) for of, buffer in twins), *_ranges(buffers)]

    def enqueue(self, context: Any, stream: Any) -> None:
        """Requests the engine alone."""
        name = self.session.spec.name
        for tensor, shape in self._shapes.items():
            if not context.set_input_shape(tensor, shape):
                raise BackendError(f"the engine of the graph {name!r} refuses {tensor!r} of the shape {list(shape)}")
        for tensor, address in self._addresses.items():
            if not context.set_tensor_address(tensor, address):
                raise BackendError(f"the engine of the graph {name!r} refuses the address of {tensor!r}")
        if not context.execute_async_v3(stream):
            raise BackendError(f"the engine of the graph {name!r} did not start")

    def __call__(self) -> None:
        backend = self.session.backend
        device, stream = backend.device, backend.stream
        with backend.lock:
            for array, address in self._ups:
                device.upload(address, array, stream)
            self.enqueue(self.session.shared_context(self.profile), stream)
            for array, address in self._downs:
                device.download(array, address, stream)
            device.wait(stream)
        backend.counts.add(self.session.layers, len(self._ups) + len(self._downs), waits=1)


class Composition:
    """Chains of calls as one captured graph: uploads, the chains beside each other, downloads. One wait."""

    def __init__(self, backend: TensorRtBackend, chains: Sequence[Sequence[EngineCall]]) -> None:
        self._backend, self._chains = backend, chains
        self._calls = [call for chain in chains for call in chain]
        device = backend.device
        self._streams = [backend.stream, *(device.stream() for _ in chains[1:])]
        self._begin, self._ends = device.event(), [device.event() for _ in chains[1:]]
        for thing in (*self._streams[1:], self._begin, *self._ends):
            weakref.finalize(self, device.release, thing)
        self._contexts = {id(call): call.session.new_context(call.profile) for call in self._calls}
        self._ups = _ranges(buffer for call in self._calls for buffer in call.inputs)
        self._downs = _ranges(buffer for call in self._calls for buffer in call.outputs)
        key = tuple(tuple(call.shapes for call in chain) for chain in chains)
        with backend.lock:
            self._enqueue()  # engines prepare themselves in their first run
            device.wait(backend.stream)
            self._graph = device.capture(backend.stream, self._enqueue)
            weakref.finalize(self, device.release, self._graph)
            if key not in backend.replays_well:
                backend.replays_well[key] = self._probed()
            if not backend.replays_well[key]:
                self._graph = None

    def __call__(self) -> None:
        device, stream = self._backend.device, self._backend.stream
        with self._backend.lock:
            if self._graph is None:
                self._enqueue()
            else:
                device.launch(self._graph, stream)
            device.wait(stream)
        launches = self._layers() if self._graph is None else 1
        self._backend.counts.add(launches, len(self._ups) + len(self._downs), waits=1)

    def _layers(self) -> int | None:
        layers = [call.session.layers for call in self._calls]
        return None if None in layers else sum(count or 0 for count in layers)

    def _enqueue(self) -> None:
        device, main = self._backend.device, self._backend.stream
        for array, address in self._ups:
            device.upload(address, array, main)
        device.record(self._begin, main)
        for chain, stream in zip(self._chains, self._streams, strict=True):
            if stream is not main:
                device.follow(stream, self._begin)
            for call in chain:
                call.enqueue(self._contexts[id(call)], stream)
        for stream, end in zip(self._streams[1:], self._ends, strict=True):
            device.record(end, stream)
            device.follow(main, end)
        for array, address in self._downs:
            device.download(array, address, main)

    def _probed(self) -> bool:
        """Whether the captured graph replays what the calls compute; if not, there is a warning. All memory is as
        before. The graph runs first: where it lacks a copy, it must not find what the calls left."""
        kept = self._keep()
        try:
            well = self._replays()
        finally:
            self._put_back(kept)
        if not well:
            names = ", ".join(dict.fromkeys(call.session.spec.name for call in self._calls))
            text = f"the graphs {names} replay wrongly on the device {self._backend.device.name}"
            if self._backend.strict:
                raise BackendError(text)
            log.warning("%s: their calls are not captured", text)
        return well

    def _replays(self) -> bool:
        random = np.random.default_rng(0)
        for number in range(PROBES):
            values = [
                (call.buffers[name], array)
                for call in self._calls
                for name, array in input_values(call.session.spec, call.buffers, number, random).items()
            ]
            replayed, plain = (self._results(run, values) for run in (self._launch, self._enqueue))
            if any(differ(*pair) for pair in zip(plain, replayed, strict=True)):
                return False
        return True

    def _launch(self) -> None:
        self._backend.device.launch(self._graph, self._backend.stream)

    def _results(self, run: Callable[[], None], values: Sequence[tuple[Buffer, Array]]) -> list[Array]:
        """All outputs of the calls on these inputs. Outputs are overwritten before, caches are zeroed."""
        for buffer in self._outputs():
            buffer.write(np.zeros(buffer.shape, buffer.dtype))
        for buffer, array in values:
            buffer.write(array)
        run()
        self._backend.device.wait(self._backend.stream)
        return [buffer.read() for buffer in self._outputs()]

    def _outputs(self) -> list[Buffer]:
        found = [call.buffers[t.name] for call in self._calls for t in call.session.spec.outputs]
        return list({id(buffer): buffer for buffer in found}.values())

    def _keep(self) -> list[tuple[Buffer, Array]]:
        used = {id(buffer): buffer for call in self._calls for buffer in call.buffers.values()}
        return [(buffer, buffer.read()) for buffer in used.values()]

    @staticmethod
    def _put_back(kept: Sequence[tuple[Buffer, Array]]) -> None:
        for buffer, array in kept:
            buffer.write(array)


def _check_bound(spec: GraphSpec, buffers: Mapping[str, Buffer]) -> None:
    """Raises BackendError unless there is a buffer of the right type and shape for each tensor, and no other."""
    tensors, sizes = (*spec.inputs, *spec.outputs), dict[str, int]()
    if others := sorted(set(buffers) - {tensor.name for tensor in tensors}):
        raise BackendError(f"graph {spec.name!r} has no {others[0]!r}")
    for tensor in tensors:
        buffer = buffers.get(tensor.name)
        if buffer is None:
            raise BackendError(f"graph {spec.name!r}: nothing is bound to {tensor.name!r}")
        fits = len(buffer.shape) == len(tensor.shape) and all(
            size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
            for size, wanted in zip(buffer.shape, tensor.shape, strict=True)
        )
        if not fits or buffer.dtype != storage(tensor.dtype):
            raise BackendError(
                f"graph {spec.name!r}: {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, and a buffer of "
                f"{buffer.dtype} {list(buffer.shape)} is bound to it"
            )
    for output, source in spec.aliases.items():
        if buffers[output] is not buffers[source]:
            raise BackendError(f"graph {spec.name!r}: {output!r} must be bound to the buffer of {source!r}")


def _alloc(device: Device, owner: object, size: int) -> int:
    """Memory of the device that is freed with `owner`."""
    address = device.alloc(size)
    weakref.finalize(owner, device.free, address)
    return address


def _ranges(buffers: Iterable[Buffer]) -> list[tuple[Array, int]]:
    """For each block that the buffers are parts of: its bytes from the first part to the last, and their address."""
    parts: dict[Block, list[BlockBuffer]] = {}
    for buffer in buffers:
        if isinstance(buffer, BlockBuffer):
            parts.setdefault(buffer.block, []).append(buffer)
    found = []
    for block, of_block in parts.items():
        first = min(part.offset for part in of_block)
        last = max(part.offset + part.array.nbytes for part in of_block)
        found.append((block.bytes[first:last], block.address + first))
    return found


def _within(shape: tuple[int, ...], limits: Any) -> bool:
    least, _, most = (tuple(limit) for limit in limits)
    return len(shape) == len(least) and all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

"""ONNX Runtime: sessions on the bundle's graphs, buffers bound by address.

A bound call costs 3 to 27 us, `run(dict)` 6 to 84 us. A cache whose input and output have the same address is updated
in place. Two settings were measured on shape M of benchmarks/generation.py, on two idle cores:

- Threads spin while a graph runs and stop when it ends: 43 bytes/s; 39 without spinning; 26 if they go on spinning.
  Each session has its own threads, which would otherwise take the cores from the next session.
- Weights are prepacked: 43 bytes/s against 37. Packed weights are private memory, and packing costs 2 s per GB when
  opening.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import choice
from ..bundle.bundle import Bundle, entry_of
from ..bundle.graph_file import read_graph
from ..bundle.manifest import FILE_NAME as MANIFEST
from ..bundle.manifest import QUANTISED
from ..bundle.spec import GraphSpec, ModelSpec, resident_spec, row_spec, table_spec
from ..errors import BackendError, BundleError, MissingExtra, UsageError
from .blocks import BlockBuffer, Blocks
from .counts import Counts
from .device import NO_CAPTURE, DeviceBlock, DeviceBuffer, StepBuffer, Transfers, element_type
from .failures import Failures, failure, first_line
from .nvidia import probe
from .probe import PROBES, differ, input_values, memory_values
from .protocol import Buffer, Call, HostBuffer, Place
from .providers import (
    NAMES,
    PROVIDERS,
    TABLE_PLACES,
    cache_folder,
    check_bundle,
    check_capture,
    check_engine_cache,
    check_placement,
    check_row_provider,
    choose,
    device_nodes,
    open_session,
    tensorrt_options,
)

log = logging.getLogger("blt_runtime")
BLOCK = 1 << 14
"""Bytes of the blocks that buffers of decode steps are parts of, on CUDA. A call copies them whole."""
EXPAND = ("session.disable_quant_qdq", "1")
"""Option of sessions on the CPU: the DequantizeLinear of the flavour portable are computed once, when a session opens.
Products then have the numerics of GPUs. By default ONNX Runtime would round their left sides to 8 bits."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def import_library() -> Any:
    """The module onnxruntime. It sends no telemetry, and keeps no identifier of this machine, unless the variable
    ORT_DISABLE_TELEMETRY is already 0. Raises ImportError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when the module is loaded
    import onnxruntime

    return onnxruntime


def load_library(minimum: str) -> Any:
    """The module onnxruntime. Raises MissingExtra, or BackendError if it is older than `minimum`."""
    try:
        onnxruntime = import_library()
    except ImportError as error:
        raise MissingExtra("onnxruntime", "cpu") from error
    if _version(onnxruntime.__version__) < _version(minimum):
        raise BackendError(
            f"the bundle needs onnxruntime {minimum} or newer, but {onnxruntime.__version__} is installed: "
            "pip install --upgrade 'blt-runtime[cpu]'"
        )
    return onnxruntime


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


PREPACK_UP_TO = 4 << 30
OPEN_AT_ONCE = 2
"""Sessions opened at once. One thread opens one session. Of the 1.9 s of processor time for 1.6 GB in 8 bits, 0.7 s are
first accesses to pages, the rest reading and packing. The latent graph is three quarters of it."""
ROWS_MINIMUM = "1.32"
"""The first onnxruntime whose GroupQueryAttention takes rows of different lengths in one call (query_seqlens)."""


_BUILD_LACKS = ("NotImplemented", "EPFail")
"""onnxruntime's errors for an operator or a provider that its build lacks."""


class OnnxBackend:
    """Runs a bundle's graphs with ONNX Runtime.

    threads: threads per operator; None is ONNX Runtime's choice (one per core). provider: "cpu", "cuda", "tensorrt" or
    "webgpu" (`backends.providers`). There is no fallback: BackendError is raised if it is missing, if it does not run
    the bundle's flavour and precision, and if it leaves a node to the CPU. "auto" is the first of cuda, tensorrt,
    webgpu and cpu that runs the bundle here; the log says which, and `provider` is its name. spin: idle threads wait
    busily for the next operator. prepack: copy weights into the kernels' own layout (15 % faster at half a billion
    weights); False keeps them memory-mapped and shared by processes, and opens 6 GB in a second instead of 15. None
    packs up to PREPACK_UP_TO bytes. Quantised graphs are always packed: unpacked, their products take a thousand times
    as long (1024 x 1024 at 8 bits: 25 ms instead of 25 us). resident: run the graphs that keep byte states and patch
    vectors (`spec.resident_spec`); None runs them on devices. `spec` describes the graphs that run. capture: capture
    the calls of decode steps of resident graphs (`DeviceSession`); None captures them where the provider computes the
    same then. engine_cache: the folder where the provider tensorrt keeps its engines; None is blt/tensorrt in the
    user's cache folder. UsageError for another provider, but auto, which may choose tensorrt. `counts`: requests to the
    device; None on the CPU.
    """

    name = "onnx"
    _batched = False

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        provider: str = "cpu",
        spin: bool = True,
        prepack: bool | None = None,
        resident: bool | None = None,
        capture: bool | None = None,
        engine_cache: str | Path | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError("threads must be at least 1")
        self._ort = load_library(bundle.manifest.min_onnxruntime)
        choice("provider", provider, NAMES)
        check_engine_cache(engine_cache, provider)
        self._provider = choose(self._ort, provider, bundle.manifest, bundle.path, self._batched)
        self.provider = self._provider.name
        self._engine_cache = None if engine_cache is None else Path(engine_cache)
        self._failures = Failures(self.provider)
        self.counts = None if self._provider.device is None else Counts()
        if resident is None:
            resident = self._keeps_states(bundle)
        self.spec = resident_spec(bundle.manifest.spec) if resident else bundle.manifest.spec
        if capture:
            check_capture(self._provider, self.spec.graphs)
        elif capture is None:
            capture = self._provider.capture is not None and self._provider.captures_windows
        self._captures = capture and self.spec.resident
        device = self._provider.device if self._provider.addresses else None
        self._blocks = None if device is None else Blocks(BLOCK, partial(DeviceBlock, self._ort, device))
        if prepack is None:
            prepack = self._packs(bundle)
        packed = {name: prepack or bundle.manifest.precision_of(name) in QUANTISED for name in bundle.manifest.graphs}
        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            opening = {
                name: pool.submit(self._open, bundle, graph, self._options(threads, spin, packed[name]))
                for name, graph in _largest_first(bundle, self.spec)
            }
            self._sessions = {name: opening[name].result() for name in bundle.manifest.spec.graphs}

    def _keeps_states(self, bundle: Bundle) -> bool:
        return self._provider.device is not None and bool(bundle.manifest.resident_graphs)

    @staticmethod
    def _packs(bundle: Bundle) -> bool:
        return _weight_bytes(bundle) <= PREPACK_UP_TO

    def session(self, group: str) -> OnnxSession:
        return self._sessions[group]

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        if self._provider.device is None or place == "host":
            return HostBuffer(dtype, shape)
        if place != "device":
            return StepBuffer(dtype, shape) if self._blocks is None else self._blocks.buffer(dtype, shape, place)
        return DeviceBuffer(self._ort, self._provider.device, dtype, shape, self._failures, self.counts)

    def _options(self, threads: int | None, spin: bool, prepack: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
        if self._provider.device is None:
            options.add_session_config_entry(*EXPAND)
        return options

    def _open(self, bundle: Bundle, spec: GraphSpec, options: Any) -> OnnxSession:
        path = bundle.resident_graph_file(spec.name) if self.spec.resident else bundle.graph_file(spec.name)
        return self._session(bundle, path, spec, options)

    def _session(self, bundle: Bundle, path: Path, spec: GraphSpec, options: Any) -> OnnxSession:
        """A session on the bytes that were checked: the file may change afterwards.

        In a hub cache it opens the file itself, since ONNX Runtime follows links to weights only from a linked graph.
        """
        content = read_graph(bundle.path, path.name, bundle.manifest, bundle.manifest.precision_of(spec.name))
        if not path.is_symlink():
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.path.absolute()))
        source = str(path) if path.is_symlink() else content
        more = self._tensorrt_options(bundle, path.stem, spec) if self._provider.name == "tensorrt" else None
        try:
            session = open_session(self._ort, self._provider, source, options, self._captures, more)
        except Exception as error:  # onnxruntime's own classes share no public base
            raise _load_failure(path, error) from error
        if self._provider.device is None:
            return OnnxSession(session, spec)
        check_placement(session, self._provider, spec.name)
        transfers = Transfers(self._ort, self._provider.device, session, spec)
        return DeviceSession(
            session,
            spec,
            transfers,
            self._captures,
            self._failures,
            counts=self.counts,
            nodes=device_nodes(session, self._provider),
            waits=self._provider.waits,
        )

    def _tensorrt_options(self, bundle: Bundle, file: str, graph: GraphSpec) -> dict[str, str]:
        contents = entry_of(bundle.path / MANIFEST).sha256
        return tensorrt_options(graph, self.spec, cache_folder(self._engine_cache, contents, file))


def check_rows(bundle: Bundle, provider: str = "cpu") -> None:
    """Raises UsageError unless the provider runs batched graphs, and BackendError unless the bundle has some that it
    and the installed onnxruntime can run. Asks no device."""
    check_row_provider(provider)
    if not bundle.manifest.row_graphs:
        raise BackendError(
            f"{bundle.path} has no batched graphs: `blt export` writes them in the flavours ort and cuda, "
            "for attention heads of size 8, 16, ..."
        )
    if provider in PROVIDERS:
        check_bundle(PROVIDERS[provider], bundle.manifest, bundle.path)
    load_library(ROWS_MINIMUM)


def _fit_device(bundle: Bundle, provider: str) -> bool:
    """Whether the GPU has four times the memory of the encoder's hash tables."""
    tables = bundle.manifest.hash_tables
    if provider != "cuda" or tables is None or bundle.manifest.table_graph is None:
        return False
    return 4 * bundle.manifest.files[tables.file].bytes <= probe().gpus[0].memory


class OnnxRowBackend(OnnxBackend):
    """Runs the batched graphs (`RowBackend`), and only those: `session` raises UsageError.

    Weights are packed unless prepack is False, because products over several tokens pack unpacked weights in each call.
    hash_tables: "host" computes hash embeddings there, one row after another; "device" copies the encoder's tables to
    the device, where it gathers from them (an entropy model's stay on the host); "auto" does so on CUDA if they take at
    most a quarter of the GPU's memory.
    Raises BackendError for a bundle without batched graphs, and for an onnxruntime before ROWS_MINIMUM; UsageError for
    "device" where the bundle has no graph for it, and for a provider whose attention takes no rows.
    """

    _batched = True

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        provider: str = "cpu",
        *,
        prepack: bool | None = None,
        hash_tables: str = "host",
    ) -> None:
        choice("provider", provider, NAMES)
        choice("hash_tables", hash_tables, TABLE_PLACES)
        check_rows(bundle, provider)
        if hash_tables == "device":
            bundle.table_graph_file()  # raises if there is none
        self._tables = hash_tables
        super().__init__(bundle, threads, provider, prepack=prepack)

    def _keeps_states(self, bundle: Bundle) -> bool:
        return bool(bundle.manifest.resident_graphs)

    def _gathers(self, bundle: Bundle) -> bool:
        """Whether the encoder gathers from hash tables on the device."""
        return self._tables == "device" or (self._tables == "auto" and _fit_device(bundle, self.provider))

    @staticmethod
    def _packs(bundle: Bundle) -> bool:
        return True

    def _open(self, bundle: Bundle, spec: GraphSpec, options: Any) -> OnnxSession:
        wanted, hash = row_spec(spec), bundle.manifest.spec.hash
        if spec.name == "encoder" and hash is not None and self._gathers(bundle):
            return self._session(bundle, bundle.table_graph_file(), table_spec(wanted, hash), options)
        return self._session(bundle, bundle.row_graph_file(spec.name), wanted, options)

    def row_session(self, group: str) -> OnnxSession:
        return self._sessions[group]

    def session(self, group: str) -> OnnxSession:
        raise UsageError("the model was opened with batched=True: use a Scheduler, or open it without batched=True")


class OnnxSession:
    """One graph, checked against its spec when it is opened."""

    def __init__(self, session: Any, spec: GraphSpec) -> None:
        self.spec = spec
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._outputs = [o.name for o in session.get_outputs()]
        for found, listed, kind in (
            (self._inputs, spec.inputs, "inputs"),
            (self._outputs, spec.outputs, "outputs"),
        ):
            if set(found) != {t.name for t in listed}:
                raise BundleError(f"graph {spec.name!r} has other {kind} than the manifest lists: export again")

    def _check_bound(self, buffers: Mapping[str, Buffer]) -> None:
        """Raises BackendError unless a contiguous buffer is there for each tensor."""
        for name in (*self._inputs, *self._outputs):
            if name not in buffers:
                raise BackendError(f"graph {self.spec.name!r}: nothing is bound to {name!r}")
            buffer = buffers[name]
            if isinstance(buffer, HostBuffer) and not buffer.array.flags.c_contiguous:
                raise BackendError(f"graph {self.spec.name!r}: {name!r} is not contiguous")

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """A call on exactly these buffers, by address; it keeps them alive."""
        self._check_bound(buffers)
        binding = self._session.io_binding()
        for names, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for name in names:
                array, element = buffers[name].array, element_type(self.spec.tensor(name).dtype)
                bind(name, "cpu", 0, element, array.shape, array.ctypes.data)
        run, kept = self._session.run_with_iobinding, dict(buffers)

        def call() -> None:
            try:
                run(binding)
            except Exception as error:
                raise failure(f"graph {self.spec.name!r} failed", error) from error
            assert kept  # the addresses in `binding` belong to these buffers

        return call


class DeviceSession(OnnxSession):
    """A graph on a device: a call copies what the host wrote, runs, and copies what the host reads.

    captures: calls on buffers of decode steps are captured: the device then replays all kernels at one request. Some
    graphs replay wrongly without an error (on WebGPU one that ended in Unsqueeze repeated its first output for ever).
    So the first call of each shape is probed: on other buffers, two inputs run captured and uncaptured. If results
    differ, calls of this shape are not captured, with a warning. `captured` counts the calls that are.
    counts: of the requests. nodes: of the graph on the device, if known. waits: a run ends when the device has done it.
    """

    def __init__(
        self,
        session: Any,
        spec: GraphSpec,
        transfers: Transfers,
        captures: bool = False,
        failures: Failures | None = None,
        *,
        counts: Counts | None = None,
        nodes: int | None = None,
        waits: bool = True,
    ) -> None:
        super().__init__(session, spec)
        self._failures = failures or Failures()
        self._transfers, self._captures, self.captured = transfers, captures, 0
        self._numbers, self._replays_well = itertools.count(), dict[tuple[tuple[int, ...], ...], bool]()
        self._counts, self._nodes, self._waits = counts or Counts(), nodes, int(waits)

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        self._check_bound(buffers)
        capture = self._captures and self._is_step(buffers) and self._probed(buffers)
        self.captured += capture
        return self._bind(buffers, capture)

    def _bind(self, buffers: Mapping[str, Buffer], capture: bool) -> Call:
        binding, up, down = self._transfers.bind(buffers, capture)
        number = next(self._numbers) if capture else NO_CAPTURE
        options = self._transfers.run_options(number) if self._captures else None
        run, kept = self._session.run_with_iobinding, dict(buffers)
        launches, count = self._nodes, self._counts.add
        copies, waits = len(up) + len(down), self._waits + bool(down)

        def call() -> None:
            nonlocal launches
            self._failures.check()
            try:
                up.run()
                run(binding, options)
                down.run()
            except Exception as error:
                raise self._failures.of(f"graph {self.spec.name!r} failed", error) from error
            count(launches, copies, waits)
            launches = 1 if capture else launches  # the first run of a captured call is the one that is recorded
            assert kept

        return call

    @staticmethod
    def _is_step(buffers: Mapping[str, Buffer]) -> bool:
        return all(
            isinstance(buffer, StepBuffer | BlockBuffer)
            for buffer in buffers.values()
            if isinstance(buffer, HostBuffer)
        )

    def _probed(self, buffers: Mapping[str, Buffer]) -> bool:
        """Whether calls of these shapes replay what they compute."""
        shapes = tuple(buffer.shape for buffer in buffers.values())
        if shapes not in self._replays_well:
            self._replays_well[shapes] = self._replays(buffers)
            if not self._replays_well[shapes]:
                log.warning("graph %r replays wrongly on this device: its calls are not captured", self.spec.name)
        return self._replays_well[shapes]

    def _replays(self, buffers: Mapping[str, Buffer]) -> bool:
        both = [self._transfers.twins(buffers) for _ in range(2)]
        calls = [self._bind(twins, capture) for twins, capture in zip(both, (False, True), strict=True)]
        random = np.random.default_rng(0)
        for name, values in memory_values(self.spec, random).items():
            for twins in both:
                twins[name].write(values)
        for number in range(PROBES):
            for name, values in input_values(self.spec, buffers, number, random).items():
                for twins in both:
                    twins[name].write(values)
            for call in calls:
                call()
            plain, replayed = ([twins[tensor.name].read() for tensor in self.spec.outputs] for twins in both)
            if any(differ(*pair) for pair in zip(plain, replayed, strict=True)):
                return False
        return True


def _largest_first(bundle: Bundle, spec: ModelSpec) -> list[tuple[str, GraphSpec]]:
    files, graphs = bundle.manifest.files, spec.graphs
    weights = {name: files.get(bundle.graph_file(name).with_suffix(".weights").name) for name in graphs}
    size = {name: 0 if entry is None else entry.bytes for name, entry in weights.items()}
    return sorted(graphs.items(), key=lambda item: -size[item[0]])


def _weight_bytes(bundle: Bundle) -> int:
    """Bytes of all files but the hash tables, which no session reads."""
    tables = {ref.file for ref in bundle.manifest.tables.values()}
    return sum(entry.bytes for name, entry in bundle.manifest.files.items() if name not in tables)


def _load_failure(path: Path, error: Exception) -> Exception:
    """A BundleError for a graph that onnxruntime rejects; a BackendError for one that this build cannot run."""
    what = f"onnxruntime cannot load {path.name}"
    found = failure(what, error)
    if isinstance(found, MemoryError) or type(error).__name__ in _BUILD_LACKS:
        return found
    return BundleError(f"{what} in {path.parent}: copy or export the bundle again ({first_line(error)})")

"""ONNX Runtime's execution providers: what each needs and runs, and how a session is opened on it."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.manifest import Manifest
from ..bundle.spec import AHEAD, MARKS, GraphSpec, ModelSpec
from ..errors import BackendError, MissingExtra, UsageError, install_command, shown
from . import nvidia

log = logging.getLogger("blt_runtime")
AUTO, TENSORRT = "auto", "tensorrt"
CPU = "CPUExecutionProvider"
_OF_SHAPES = ("Shape", "Squeeze")
_RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class Provider:
    """name: as users write it. execution: its name in ONNX Runtime. device: of its memory, as OrtValue names it; None
    is main memory. flavours, precisions: of the bundles that it runs. libraries: those of ONNX Runtime that it loads,
    and extra installs what they need."""

    name: str
    execution: str
    device: str | None
    flavours: tuple[str, ...]
    precisions: tuple[str, ...]
    extra: str
    libraries: tuple[str, ...] = ()
    rows: bool = False
    """Whether its GroupQueryAttention takes rows of different lengths, which batched graphs need."""
    waits: bool = True
    """Whether a run ends when the device has done its work. WebGPU's does not: the next copy to main memory waits."""
    capture: str | None = None
    """The option of sessions whose calls can be captured, and replayed as one."""
    captures_windows: bool = True
    """Whether such a session obeys attention windows. WebGPU's does not: after as many positions as the window, results
    are wrong without an error, captured or not (onnxruntime-ep-webgpu 0.4.0). So it captures only when asked to."""

    @property
    def addresses(self) -> bool:
        """Whether a tensor may be bound at an address in its memory."""
        return self.device == "cuda"


_CUDA, _TENSORRT = "libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so"
PROVIDERS = {
    "cpu": Provider("cpu", CPU, None, ("ort", "portable", "cuda"), ("fp32", "fp16", "int8", "int4"), "cpu", rows=True),
    "cuda": Provider(
        "cuda", "CUDAExecutionProvider", "cuda", ("cuda",), ("bf16", "fp16", "int8", "int4"), "gpu", (_CUDA,),
        rows=True, capture="enable_cuda_graph",
    ),
    "tensorrt": Provider(
        "tensorrt", "TensorrtExecutionProvider", "cuda", ("portable",), ("bf16", "fp16", "fp32", "int8", "int4"),
        "ort-trt", (_CUDA, _TENSORRT),
    ),
    "webgpu": Provider(
        "webgpu", "WebGpuExecutionProvider", "gpu", ("cuda",), ("fp32", "fp16"), "webgpu",
        waits=False, capture="enableGraphCapture", captures_windows=False,
    ),
}  # fmt: skip
"""Devices in the order in which `auto` tries them; the CPU is its last resort."""
NAMES = (*PROVIDERS, AUTO)
KEEPING_ENGINES = (TENSORRT, AUTO)
"""Providers that keep engines in a folder, and auto, which may choose one."""
TABLE_PLACES = ("auto", "host", "device")
"""Where hash embeddings of batched streams are computed."""


def check_capture(provider: Provider, graphs: Mapping[str, GraphSpec]) -> None:
    """Raises BackendError if captured calls would be wrong, or if the provider captures none."""
    if provider.capture is None:
        raise BackendError(f"provider {provider.name} captures no calls")
    windows = [name for name, graph in graphs.items() if graph.cache is not None and graph.cache.window is not None]
    if windows and not provider.captures_windows:
        raise BackendError(
            f"provider {provider.name} ignores attention windows where calls are captured, and the graph "
            f"{windows[0]!r} has one: open the model without capture"
        )


def check_row_provider(name: str) -> None:
    """Raises UsageError unless the provider of that name runs batched graphs."""
    if name != AUTO and not PROVIDERS[name].rows:
        able = " or ".join(provider.name for provider in PROVIDERS.values() if provider.rows)
        raise UsageError(f"provider {name} runs no batched graphs: choose {able}, or run single streams")


def check_engine_cache(folder: object, name: str) -> None:
    """Raises UsageError unless `folder` is None, or a path and of a provider that keeps engines."""
    if folder is None:
        return
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise UsageError(f"engine_cache must be the path of a folder, not {shown(folder)}")
    if name not in KEEPING_ENGINES:
        raise UsageError(f"engine_cache is for the provider {TENSORRT}, not {name}: leave it out")


def check_bundle(provider: Provider, manifest: Manifest, path: object) -> None:
    """Raises BackendError unless the provider runs bundles of that flavour and precision."""
    if manifest.flavour not in provider.flavours:
        raise BackendError(
            f"provider {provider.name} runs bundles of the flavour {provider.flavours[0]}, and {path} is "
            f"{manifest.flavour}: blt export MODEL -o DIR --flavour {provider.flavours[0]}"
        )
    for precision in sorted(set(map(manifest.precision_of, manifest.graphs))):
        if precision == "bf16" and provider.device is None:
            raise BackendError(f"{path} is of bf16, which has no kernels on CPUs: export at fp16 or fp32")
        if precision not in provider.precisions:
            runs = " and ".join([", ".join(provider.precisions[:-1]), provider.precisions[-1]])
            raise BackendError(
                f"{path} is of {precision}, and provider {provider.name} runs {runs}: "
                f"blt export MODEL -o DIR --flavour {manifest.flavour} --precision {provider.precisions[0]}"
            )


def choose(library: Any, name: str, manifest: Manifest, path: object, rows: bool = False) -> Provider:
    """The provider of that name, which can run the bundle here. "auto" is the first that can, and logs its choice.

    rows: its batched graphs. Raises BackendError (also MissingExtra) if it cannot, or if none can.
    """
    if name != AUTO:
        check_bundle(PROVIDERS[name], manifest, path)
        check_available(library, PROVIDERS[name])
        return PROVIDERS[name]
    refused = []
    for provider in (*(p for p in PROVIDERS.values() if p.device is not None), PROVIDERS["cpu"]):
        if rows and not provider.rows:
            continue
        try:
            check_bundle(provider, manifest, path)
            if provider.device is not None:
                check_available(library, provider)
        except BackendError as error:
            if manifest.flavour in provider.flavours:
                refused.append(f"{provider.name}: {error}")
            continue
        reasons = f" ({'; '.join(refused)})" if refused else f" (for bundles of the flavour {manifest.flavour})"
        log.log(logging.WARNING if refused else logging.INFO, "provider auto: %s%s", provider.name, reasons)
        return provider
    raise BackendError(f"no provider runs {path} here: {'; '.join(refused)}")


def check_available(library: Any, provider: Provider) -> None:
    """Raises MissingExtra or BackendError unless the installed onnxruntime has the provider and finds a device."""
    if provider.name == "webgpu":
        _register_webgpu(library)
        if not _webgpu_devices(library):
            raise BackendError("provider webgpu: no WebGPU device was found; on Linux it needs a Vulkan driver")
    elif provider.device == "cuda":
        _check_nvidia(library, provider)
    else:
        _check_built(library, provider)


def _check_nvidia(library: Any, provider: Provider) -> None:
    """From what is most often missing to what is least: nothing of NVIDIA's is loaded before a device is there."""
    found = nvidia.probe()
    nvidia.check_distributions()
    _check_built(library, provider)
    nvidia.check_driver(found, str(getattr(library, "cuda_version", "")), f"onnxruntime-gpu {library.__version__}")
    folder = Path(library.__file__).parent / "capi"
    needed = [name for file in provider.libraries for name in nvidia.needed_libraries(folder / file)]
    nvidia.check_libraries(dict.fromkeys(needed), f"provider {provider.name}", provider.extra)


def _check_built(library: Any, provider: Provider) -> None:
    if provider.execution not in library.get_available_providers():
        found = ", ".join(library.get_available_providers())
        first = "" if provider.device is None else "pip uninstall -y onnxruntime, then "
        raise BackendError(
            f"the installed onnxruntime has no {provider.execution}, only {found}: "
            f"{first}{install_command(provider.extra)}"
        )


def open_session(
    library: Any,
    provider: Provider,
    source: str | bytes,
    options: Any,
    capture: bool = False,
    more: Mapping[str, str] | None = None,
) -> Any:
    """An InferenceSession on the provider. capture: its calls can be captured. more: options of the provider. Raises
    onnxruntime's errors."""
    given = {**({str(provider.capture): "1"} if capture else {}), **(more or {})}
    if provider.device is None:
        return library.InferenceSession(source, options, providers=[CPU])
    options.add_session_config_entry(_RECORD, "1")
    if provider.name == "webgpu":
        options.add_provider_for_devices(_webgpu_devices(library)[:1], {"enableInt64": "1", **given})
        return library.InferenceSession(source, options)
    if provider.name == "cuda":
        given["use_tf32"] = "0"
    providers = [(provider.execution, given), CPU]
    return library.InferenceSession(source, options, providers=providers, enable_fallback=0)


def check_placement(session: Any, provider: Provider, graph: str) -> None:
    """Raises BackendError if a node of the graph runs on the CPU: each call would copy between the two. Shapes are
    known there without a copy."""
    if session.get_providers()[0] != provider.execution:
        found = ", ".join(session.get_providers())
        raise BackendError(f"provider {provider.name} was left out of the graph {graph!r}, which runs on {found}")
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == CPU:
            nodes.update(node.op_type for node in part.get_nodes() if node.op_type not in _OF_SHAPES)
    if nodes:
        listed = ", ".join(f"{count} {name}" for name, count in nodes.most_common(6))
        raise BackendError(f"provider {provider.name} leaves nodes of the graph {graph!r} to the CPU: {listed}")


def device_nodes(session: Any, provider: Provider) -> int | None:
    """Nodes of the session's graph on the device, each of them one request to it or more. None where they are not
    known: TensorRT makes engines of many nodes."""
    if provider.name == TENSORRT:
        return None
    parts = session.get_provider_graph_assignment_info()
    return sum(len(part.get_nodes()) for part in parts if part.ep_name == provider.execution) or None


# --- TensorRT ----------------------------------------------------------------------------------------------


def cache_folder(folder: Path | None, bundle: str, graph: str) -> Path:
    """The folder of a graph's engines in `folder`, made if it is not there. folder: None is blt/tensorrt in the user's
    cache folder. bundle: an id of its contents. graph: the name of its file.

    ONNX Runtime names engines by the graph's nodes and not by its weights, so each bundle and graph has a folder. An
    engine is code: raises BackendError if others can write to a folder, and if there can be none.
    """
    base = folder or _cache_home() / "blt" / "tensorrt"
    wanted = base / bundle[:32] / graph
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"cannot keep engines in {wanted}: {error.strerror}") from error
    for path in (base, wanted.parent, wanted):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise BackendError(f"{path} holds engines, which are code, and others can write there: chmod 700 {path}")
    return wanted


def tensorrt_options(graph: GraphSpec, spec: ModelSpec, cache: Path) -> dict[str, str]:
    """Options of the provider tensorrt: engines and timings are kept in the folder `cache`. An engine takes all numbers
    of tokens up to a chunk; without such a range, TensorRT would build a new one for each longer chunk."""
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    most = {"B": 1, "S": spec.chunk, "R": spec.decoder_window + spec.chunk + MARKS + AHEAD}
    varying = [t for t in graph.inputs if any(isinstance(size, str) for size in t.shape)]
    if any(isinstance(size, str) and size not in most for tensor in varying for size in tensor.shape):
        return options  # the latent graph's P and L: their largest product would take far more memory than is used
    least = dict.fromkeys(most, 1)
    for name, sizes in (("min", least), ("opt", least), ("max", most)):
        shapes = (f"{t.name}:{'x'.join(map(str, t.resolve(**sizes)))}" for t in varying)
        options[f"trt_profile_{name}_shapes"] = ",".join(shapes)
    return options


def _cache_home() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return home if home.is_absolute() else Path.home() / ".cache"


# --- WebGPU ------------------------------------------------------------------------------------------------


def _register_webgpu(library: Any) -> None:
    """Loads the provider's library, once per process."""
    try:
        import onnxruntime_ep_webgpu as plugin
    except ImportError as error:
        raise MissingExtra("onnxruntime-ep-webgpu", "webgpu") from error
    if "webgpu" not in _registered:
        library.register_execution_provider_library("webgpu", plugin.get_library_path())
        _registered.add("webgpu")


_registered: set[str] = set()


def _webgpu_devices(library: Any) -> list[Any]:
    return [device for device in library.get_ep_devices() if device.ep_name == PROVIDERS["webgpu"].execution]

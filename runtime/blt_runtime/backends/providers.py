"""ONNX Runtime's execution providers, and how a session is opened on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle.spec import GraphSpec
from ..errors import BackendError, MissingExtra, install_command

CPU = "CPUExecutionProvider"
_OF_SHAPES = ("Shape", "Squeeze")
_RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class Provider:
    """name: as users write it. execution: its name in ONNX Runtime. device: of its memory, as OrtValue names it; None
    is main memory. flavours: of the bundles that it runs."""

    name: str
    execution: str
    device: str | None
    flavours: tuple[str, ...]
    capture: str | None = None
    """The option of sessions whose calls can be captured, and replayed as one."""
    captures_windows: bool = True
    """Whether such a session obeys attention windows. WebGPU's does not: after as many positions as the window, results
    are wrong without an error, captured or not (onnxruntime-ep-webgpu 0.4.0). So it captures only when asked to."""


PROVIDERS = {
    "cpu": Provider("cpu", CPU, None, ("ort", "portable", "cuda")),
    "cuda": Provider("cuda", "CUDAExecutionProvider", "cuda", ("cuda",), "enable_cuda_graph"),
    "webgpu": Provider("webgpu", "WebGpuExecutionProvider", "gpu", ("cuda",), "enableGraphCapture", False),
}


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


def check_flavour(provider: Provider, flavour: str, path: object) -> None:
    """Raises BackendError unless the provider runs bundles of that flavour."""
    if flavour not in provider.flavours:
        raise BackendError(
            f"provider {provider.name} runs bundles of the flavour {provider.flavours[0]}, and {path} is {flavour}: "
            f"blt export MODEL -o DIR --flavour {provider.flavours[0]}"
        )


def check_available(library: Any, provider: Provider) -> None:
    """Raises MissingExtra or BackendError unless the installed onnxruntime has the provider and finds a device."""
    if provider.name == "webgpu":
        _register_webgpu(library)
        if not _webgpu_devices(library):
            raise BackendError("provider webgpu: no WebGPU device was found; on Linux it needs a Vulkan driver")
    elif provider.execution not in library.get_available_providers():
        found = ", ".join(library.get_available_providers())
        raise BackendError(
            f"the installed onnxruntime has no {provider.execution}, only {found}: {install_command('gpu')}"
        )


def open_session(library: Any, provider: Provider, source: str | bytes, options: Any, capture: bool = False) -> Any:
    """An InferenceSession on the provider. capture: its calls can be captured. Raises onnxruntime's errors."""
    captured = {str(provider.capture): "1"} if capture else {}
    if provider.name == "webgpu":
        options.add_session_config_entry(_RECORD, "1")
        options.add_provider_for_devices(_webgpu_devices(library)[:1], {"enableInt64": "1", **captured})
        return library.InferenceSession(source, options)
    if provider.name == "cuda":
        options.add_session_config_entry(_RECORD, "1")
        cuda = (provider.execution, {"use_tf32": "0", **captured})
        return library.InferenceSession(source, options, providers=[cuda, CPU])
    return library.InferenceSession(source, options, providers=[CPU])


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

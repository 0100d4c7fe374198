"""ONNX Runtime on a device with addresses, as CUDA is: the CPU with a second copy of everything replaces it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest

from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.backends import device, onnx
from blt_runtime.backends.counts import Counts
from blt_runtime.backends.onnx import OnnxBackend
from blt_runtime.backends.providers import PROVIDERS, Provider, device_nodes
from blt_runtime.bundle.bundle import Bundle
from tests.exports import prepare
from tests.runtime.device_backend import assert_streams_equal


class Library:
    """onnxruntime, whose copies between main memory and the CPU's own are made here, and counted."""

    def __init__(self, real: Any) -> None:
        self._real, self.copied = real, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def copy_tensors(self, sources: list[Any], targets: list[Any]) -> None:
        for source, target in zip(sources, targets, strict=True):
            size = source.tensor_size_in_bytes()
            assert size == target.tensor_size_in_bytes()
            ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
            self.copied.append(size)


class Addressed(Provider):
    @property
    def addresses(self) -> bool:
        return True


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    state = prepare("cross_windows_own_heads_newlines", "cuda", capacity=192, check=False)
    return Bundle.open(pipeline.run(state, tmp_path_factory.mktemp("device") / "bundle").path)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made, cpu = Library(onnx.import_library()), PROVIDERS["cpu"]
    provider = Addressed("cpu", cpu.execution, "cpu", cpu.flavours, cpu.precisions, cpu.extra)
    monkeypatch.setattr(onnx, "load_library", lambda minimum: made)
    monkeypatch.setattr(onnx, "choose", lambda *_: provider)
    monkeypatch.setattr(onnx, "check_placement", lambda *_: None)
    monkeypatch.setattr(device, "_places", lambda tensors, infos: {tensor.name: True for tensor in tensors})
    return made


def test_streams_equal_those_of_the_cpu(bundle: Bundle, library: Library) -> None:
    want = Model(bundle.manifest.spec, _plain(bundle), bundle.hash_tables()).stream(bos=False)
    backend = OnnxBackend(bundle, provider="cuda")
    assert backend.spec.resident
    assert_streams_equal(Model(backend.spec, backend, bundle.hash_tables()), want, 30)


def test_a_call_of_a_step_is_one_copy_up_and_one_down(bundle: Bundle, library: Library) -> None:
    backend = OnnxBackend(bundle, provider="cuda")
    stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
    list(stream.generate_ids(40, temperature=0.0, stop_at_eos=False))
    patches, library.copied = len(stream.patch_lengths), []
    list(stream.generate_ids(1, temperature=0.0, stop_at_eos=False))
    closed = len(stream.patch_lengths) > patches
    assert len(library.copied) == 5 + closed  # entropy 2, encoder 1 (its states stay), decoder 2, latent 1
    assert set(library.copied) == {onnx.BLOCK}


def test_requests_are_counted(bundle: Bundle, library: Library) -> None:
    backend = OnnxBackend(bundle, provider="cuda")
    nodes = {name: device_nodes(backend.session(name)._session, backend._provider) for name in backend.spec.graphs}
    stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
    assert backend.counts is not None
    list(stream.generate_ids(40, temperature=0.0, stop_at_eos=False))
    patches, library.copied, before = len(stream.patch_lengths), [], replace(backend.counts)
    list(stream.generate_ids(1, temperature=0.0, stop_at_eos=False))
    calls = ["entropy", "encoder", "decoder", *(["latent"] if len(stream.patch_lengths) > patches else [])]
    assert backend.counts.since(before) == Counts(
        launches=sum(nodes[name] or 0 for name in calls),
        copies=len(library.copied),
        waits=len(calls) + 2,  # each run, and the results of the entropy model and of the decoder
    )
    stream.snapshot()
    assert backend.counts.copies > before.copies + len(calls) + 2


def test_the_nodes_of_engines_are_unknown(bundle: Bundle, library: Library) -> None:
    backend = OnnxBackend(bundle, provider="cuda")
    assert device_nodes(backend.session("decoder")._session, PROVIDERS["tensorrt"]) is None


def _plain(bundle: Bundle) -> OnnxBackend:
    """On the CPU itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "load_library", lambda minimum: onnx.import_library())
        patch.setattr(onnx, "choose", lambda *_: PROVIDERS["cpu"])
        return OnnxBackend(bundle)

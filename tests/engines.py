"""Engines on the stand-ins for TensorRT and a device, and the bundle that tests build them from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from blt_export import pipeline
from blt_runtime.backends.platform import Platform
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.engines import Machine
from blt_runtime.bundle.spec import ModelSpec, TensorSpec
from tests import fake_tensorrt
from tests.exports import prepare
from tests.host_device import HostDevice

VARIANT = "max_patch_length"


def platform(version: str = fake_tensorrt.VERSION, gpu: str = fake_tensorrt.GPU) -> Platform:
    device = HostDevice()
    trt = fake_tensorrt.module(device, version, gpu)
    return Platform(trt, device, Machine(version, gpu, "9.0", "580.1", "13.0"))


@contextmanager
def own_key(folder: Path) -> Iterator[None]:
    """The key that signs engines is in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield


def exported(folder: Path, precision: str = "fp32", variant: str = VARIANT) -> Bundle:
    state = prepare(variant, "portable", capacity=192, precision=precision, check=False)
    return Bundle.open(pipeline.run(state, folder / "bundle").path)


def with_states(spec: ModelSpec, width: int) -> ModelSpec:
    """The specification with byte states of that many numbers."""
    graphs = {
        name: replace(
            graph,
            inputs=tuple(map(_widened(width), graph.inputs)),
            outputs=tuple(map(_widened(width), graph.outputs)),
        )
        for name, graph in spec.graphs.items()
    }
    return replace(spec, graphs=graphs)


def _widened(width: int) -> Callable[[TensorSpec], TensorSpec]:
    return lambda t: replace(t, shape=(*t.shape[:-1], width)) if t.name in ("byte_states", "past_states") else t

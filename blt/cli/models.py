"""From a MODEL argument to a model that runs.

A MODEL is a bundle (a folder with manifest.json: runs on ONNX Runtime, needs no torch), a folder of TensorRT engines
(with engines.json too), or a checkpoint (model.pt, run folder, reference or Hugging Face folder, hub name: runs on
PyTorch, or on ONNX Runtime through a temporary bundle).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from blt.cli import console, devices
from blt.cli.inputs import is_bundle, is_engines
from blt.cli.options import ModelOptions
from blt_runtime.errors import BackendError, UsageError

if TYPE_CHECKING:
    from blt.checkpoint.models import Checkpoint
    from blt_runtime import Model
    from blt_runtime.bundle.spec import ModelSpec

log = logging.getLogger("blt.cli")


@contextmanager
def open_model(path: Path, how: ModelOptions, capacity: int | None = None) -> Iterator[Model]:
    """The model at `path`, ready for `model.stream()`.

    capacity: bytes that a stream of a checkpoint must hold (default: the trained length); a bundle's is fixed.
    Raises UsageError for options that do not fit the model, CheckpointError or BundleError for a damaged file, and
    ModuleNotFoundError (exit 4) where the backend's library is not installed.
    """
    if is_bundle(path):
        if how.entropy_dtype == "bfloat16":
            raise UsageError(f"{path} is a bundle, which computes entropies in float32; give the checkpoint")
        yield _open_bundle(path, how)
        return
    check_for_checkpoint(path, how)
    if how.precision not in (None, "fp32"):
        raise UsageError(
            f"{path} is a checkpoint, which runs at fp32: blt export {path} -o DIR --precision {how.precision}"
        )
    from blt.checkpoint.models import load

    checkpoint = load(path, entropy_model=how.entropy_model, entropy_dtype=how.entropy_dtype, generates=True)
    if how.backend == "onnx":
        log.info("exporting %s to a temporary bundle (blt export makes a lasting one)", path)
    with open_checkpoint(checkpoint, how, capacity) as model:
        yield model


@contextmanager
def open_checkpoint(checkpoint: Checkpoint, how: ModelOptions, capacity: int | None = None) -> Iterator[Model]:
    """A checkpoint in memory as a model: on PyTorch, or on ONNX Runtime through a temporary bundle."""
    if how.backend == "onnx":
        from blt_export import export
        from blt_export.pipeline import STEPS

        with tempfile.TemporaryDirectory(prefix="blt-bundle-") as folder:
            bundle, flavour = Path(folder) / "bundle", _flavour(how.provider)
            with console.named_steps("export", len(STEPS)) as begin:
                export(checkpoint, bundle, flavour=flavour, capacity=capacity, check=False, progress=begin)
            yield _open_bundle(bundle, replace(how, entropy_model=None, precision=None))
    else:
        from blt.generate.torch_backend import open_model as open_torch

        device = "cpu" if how.device == "auto" else devices.torch_device(how.device)
        yield open_torch(checkpoint, device=device, threads=how.threads, capacity=capacity)


def check_for_checkpoint(path: Path, how: ModelOptions) -> None:
    """Raises UsageError for options that the checkpoint at `path` does not have. With --backend onnx also BackendError
    for a provider that is not here."""
    _check_trust(path, how)
    if how.backend != "onnx":
        if how.provider != "cpu":
            raise UsageError(f"--provider {how.provider} is ONNX Runtime's: give a bundle, or add --backend onnx")
        return
    from blt_runtime.backends.onnx import load_library
    from blt_runtime.backends.providers import AUTO, PROVIDERS, check_available

    if how.provider in ("cpu", AUTO):
        return
    provider, lowest = PROVIDERS[how.provider], "1.30"
    if "fp32" not in provider.precisions:
        flavour, precision = provider.flavours[0], provider.precisions[0]
        raise UsageError(
            f"--backend onnx makes a temporary bundle of fp32, which --provider {how.provider} does not run: "
            f"blt export {path} -o DIR --flavour {flavour} --precision {precision}"
        )
    check_available(load_library(lowest), provider)


def _flavour(provider: str) -> str:
    """That of a temporary bundle for the provider. `auto` looks for a device."""
    from blt_runtime.backends.providers import PROVIDERS

    return PROVIDERS[provider].flavours[0] if provider in PROVIDERS else "cuda"


def check_batched(path: Path, how: ModelOptions, streams: int = 1) -> None:
    """Raises UsageError unless there is a bundle at `path` and the provider runs batched graphs, or engines that have
    so many batched streams; BackendError for a bundle that has no graphs for it. Asks no device."""
    if not is_bundle(path):
        raise UsageError(f"{path} is a checkpoint; batched streams need a bundle: blt export {path} -o DIR")
    _check_trust(path, how)
    from blt_runtime import Bundle
    from blt_runtime.backends.onnx import check_rows
    from blt_runtime.bundle.engines import Engines

    if is_engines(path):
        Engines.read(path).check_rows(streams)
    else:
        check_rows(Bundle.open(path, "sizes"), how.provider)


def batched_spec(path: Path, spec: ModelSpec) -> ModelSpec:
    """The specification `spec` of the single streams at `path`, with the capacities of the batched ones: those of
    engines have room for padding."""
    from blt_runtime.engine.batch import with_padding

    return with_padding(spec) if is_engines(path) else spec


def open_batched(path: Path, how: ModelOptions) -> Model:
    """The batched graphs of the bundle at `path`, or its engines for batched streams, for a `Scheduler`. Raises what
    `check_batched` raises."""
    check_batched(path, how)
    from blt_runtime import Model

    return Model.open(path, threads=how.threads, provider=how.provider, trust_engines=how.trust_engines, batched=True)


def _check_trust(path: Path, how: ModelOptions) -> None:
    if how.trust_engines and not is_engines(path):
        raise UsageError(f"{path} holds no TensorRT engines: leave --trust-engines out")


def _open_bundle(path: Path, how: ModelOptions) -> Model:
    """A bundle, or a folder of engines."""
    kind = "a folder of TensorRT engines" if is_engines(path) else "a bundle"
    if how.backend == "torch":
        raise UsageError(f"{path} is {kind}, which PyTorch does not run; for --backend torch give the model.pt")
    if how.entropy_model is not None:
        raise UsageError(f"{path} is {kind} and holds its entropy model; leave --entropy-model out")
    if how.device.startswith("cuda"):
        instead = "engines run on the first GPU" if is_engines(path) else "a bundle has --provider cuda"
        raise BackendError(f"--device {how.device} is for checkpoints: {instead}")
    _check_trust(path, how)
    from blt_runtime import Model

    return Model.open(
        path,
        backend="onnx",
        provider=how.provider,
        threads=how.threads,
        precision=how.precision,
        trust_engines=how.trust_engines,
        engine_cache=how.engine_cache,
    )

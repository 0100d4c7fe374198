"""From a MODEL argument to something that runs.

A MODEL is a bundle (a folder with manifest.json: runs on ONNX Runtime, needs no torch) or a checkpoint (model.pt, run
folder, reference or Hugging Face folder, hub name: runs on PyTorch, or on ONNX Runtime through a temporary bundle).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blt.cli import devices
from blt_runtime.errors import BackendError, UsageError

if TYPE_CHECKING:
    from blt.checkpoint.models import Checkpoint
    from blt_runtime import Model
    from blt_runtime.patching import EntropyDtype

BACKENDS = ("auto", "torch", "onnx")

log = logging.getLogger("blt.cli")


def check_backend(backend: str) -> None:
    """Raise UsageError unless `backend` is one that this build has."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")


def existing(path: Path) -> Path:
    """`path` itself, which may be a name on the hub; raises UsageError if there is nothing at it, or no model."""
    if not path.exists():
        from blt.checkpoint.hub import is_name

        if is_name(path):
            return path
        raise UsageError(f"{path}: no such file or folder; give a checkpoint, a run folder, a bundle or a hub name")
    if is_bundle(path):
        from blt.data.dataset import is_data_folder

        if is_data_folder(path):
            raise UsageError(f"{path} is a data folder, made for training; give model.pt, a run folder or a bundle")
    elif (path / "checkpoints").is_dir() and not (path / "model.pt").exists():
        raise UsageError(f"{path} is an unfinished run: the same `blt train` command finishes it")
    return path


def is_bundle(path: Path) -> bool:
    """A bundle is a folder with a manifest; checkpoint folders have none."""
    return path.is_dir() and (path / "manifest.json").exists()


def providers_of(device: str) -> list[str] | None:
    """ONNX Runtime providers for --device; None leaves the choice (CPU) to the runtime."""
    if device in ("auto", "cpu"):
        return None
    if device.split(":")[0] != "cuda":
        raise UsageError(f"--device {device}: choose auto, cpu or cuda[:n]")
    raise BackendError(f"--device {device}: this version runs bundles on the CPU only; leave --device out")


@contextmanager
def open_model(
    path: Path,
    *,
    backend: str = "auto",
    entropy_model: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    capacity: int | None = None,
    entropy_dtype: EntropyDtype | None = None,
    precision: str | None = None,
) -> Iterator[Model]:
    """The model at `path`, ready for `model.stream()`.

    capacity: bytes that a stream of a checkpoint must hold (default: the trained length); a bundle's is fixed.
    entropy_dtype: of a checkpoint's entropies (default: what it says). precision: what it must run at, if given.
    Raises UsageError for a wrong argument, CheckpointError or BundleError for a damaged file, and
    ModuleNotFoundError (exit 4) where the backend's library is not installed.
    """
    check_backend(backend)
    existing(path)
    if is_bundle(path):
        if entropy_dtype == "bfloat16":
            raise UsageError(f"{path} is a bundle, which computes entropies in float32; give the checkpoint")
        yield _open_bundle(path, backend, entropy_model, device, threads, precision)
        return
    if precision not in (None, "fp32"):
        raise UsageError(
            f"{path} is a checkpoint, which runs at fp32: blt export {path} -o DIR --precision {precision}"
        )
    from blt.checkpoint.models import load

    checkpoint = load(path, entropy_model=entropy_model, entropy_dtype=entropy_dtype, generates=True)
    if backend == "onnx":
        log.info("exporting %s to a temporary bundle (blt export makes a lasting one)", path)
        with _exported(checkpoint, device, threads, capacity) as model:
            yield model
    else:
        from blt.generate.torch_backend import open_model as open_torch

        chosen = "cpu" if device == "auto" else devices.torch_device(device)
        yield open_torch(checkpoint, device=chosen, threads=threads, capacity=capacity)


def check_many(path: Path) -> None:
    """Raises UsageError unless there is a bundle at `path`, BackendError unless it has graphs for many streams."""
    existing(path)
    if not is_bundle(path):
        raise UsageError(f"{path} is a checkpoint; many streams run on a bundle: blt export {path} -o DIR")
    from blt_runtime import Bundle
    from blt_runtime.backends.onnx import check_rows

    check_rows(Bundle.open(path, "sizes"))


def open_many(path: Path, threads: int | None) -> Model:
    """The bundle at `path` for a scheduler."""
    check_many(path)
    from blt_runtime import Model

    return Model.open(path, threads=threads, many=True)


def _open_bundle(
    path: Path,
    backend: str,
    entropy_model: Path | None,
    device: str,
    threads: int | None,
    precision: str | None = None,
) -> Model:
    if backend == "torch":
        raise UsageError(f"{path} is a bundle, which runs on onnx; for --backend torch give the model.pt")
    if entropy_model is not None:
        raise UsageError(f"{path} is a bundle and holds its entropy model; leave --entropy-model out")
    from blt_runtime import Model

    return Model.open(path, backend="onnx", threads=threads, providers=providers_of(device), precision=precision)


@contextmanager
def open_checkpoint(
    checkpoint: Checkpoint, backend: str, *, threads: int | None = None, capacity: int | None = None
) -> Iterator[Model]:
    """A checkpoint in memory as a model on the CPU: on PyTorch, or on ONNX Runtime through a temporary bundle."""
    check_backend(backend)
    if backend == "onnx":
        with _exported(checkpoint, "auto", threads, capacity) as model:
            yield model
    else:
        from blt.generate.torch_backend import open_model as open_torch

        yield open_torch(checkpoint, threads=threads, capacity=capacity)


@contextmanager
def _exported(checkpoint: Checkpoint, device: str, threads: int | None, capacity: int | None) -> Iterator[Model]:
    from blt_export import export

    with tempfile.TemporaryDirectory(prefix="blt-bundle-") as folder:
        bundle = Path(folder) / "bundle"
        export(checkpoint, bundle, capacity=capacity, check=False)
        yield _open_bundle(bundle, "onnx", None, device, threads)

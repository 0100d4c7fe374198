"""The cached PyTorch form of generation: the step modules as a backend of the runtime.

`blt_runtime.Stream` drives it exactly as it drives an exported bundle, so there is one generation loop. Buffers are
numpy arrays that share their memory with torch tensors; caches are updated in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from blt.checkpoint.models import Checkpoint, load
from blt.model.graphs import CHUNK, Limits, check_memory, model_spec
from blt.model.hashing import HashEmbedding
from blt.model.steps import StepModule, make_steps
from blt_runtime import Model
from blt_runtime.arguments import whole
from blt_runtime.backends.protocol import Buffer, Call, HostBuffer, Place
from blt_runtime.bundle.spec import GraphSpec, ModelSpec
from blt_runtime.errors import BackendError, shown
from blt_runtime.model import MOST_THREADS


class TorchSession:
    """A session of one step module. Outputs are copied into the bound buffers; caches are updated in their buffers."""

    def __init__(self, step: StepModule, spec: GraphSpec) -> None:
        self.spec = spec
        self._step = step

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        tensors = {name: torch.from_numpy(buffer.array) for name, buffer in buffers.items()}
        missing = [t.name for t in (*self.spec.inputs, *self.spec.outputs) if t.name not in tensors]
        if missing:
            raise BackendError(f"graph {self.spec.name!r}: no buffer is bound to {', '.join(missing)}")
        inputs = [tensors[t.name] for t in self.spec.inputs]
        outputs = [tensors[t.name] for t in self.spec.outputs if t.name not in self.spec.aliases]
        step = self._step

        def call() -> None:
            with torch.inference_mode():
                results: tuple[Tensor, ...] = step(*inputs)
                for output, result in zip(outputs, results, strict=False):
                    output.copy_(result)

        return call


class TorchBackend:
    """The step modules of one checkpoint, in float32 on the CPU."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        blt, _ = checkpoint.require_blt()
        steps = make_steps(
            blt, checkpoint.entropy, capacity_bytes=spec.capacity_bytes, capacity_patches=spec.capacity_patches
        )
        self._sessions = {name: TorchSession(step, spec.graphs[name]) for name, step in steps.items()}

    def session(self, group: str) -> TorchSession:
        return self._sessions[group]

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> HostBuffer:
        return HostBuffer(dtype, shape)


def open_model(
    checkpoint: str | Path | Checkpoint,
    entropy_model: str | Path | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    capacity: int | None = None,
    patches: int | None = None,
    chunk: int = CHUNK,
) -> Model:
    """A runtime model of a checkpoint or of its path. Raises CheckpointError, BackendError, UsageError, ConfigError for
    impossible sizes, and OutOfMemory.

    capacity, patches: the bytes and patches that a stream can hold (default: the trained lengths).  chunk: bytes per
    prefill call.  threads: torch's number of threads in this process.
    """
    if not isinstance(device, str) or device != "cpu":
        reason = f"the torch backend runs on the CPU, not on {shown(device)}"
        raise BackendError(f"{reason}: export a bundle for other devices")
    if threads is not None:
        torch.set_num_threads(whole("threads", threads, 1, MOST_THREADS))
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load(checkpoint, entropy_model)
    blt, rule = checkpoint.require_blt()
    entropy = checkpoint.entropy.config if checkpoint.entropy else None
    spec = model_spec(
        blt.config,
        entropy,
        rule,
        limits=Limits.of(blt.config, capacity=capacity, patches=patches, chunk=chunk),
        table_dtypes={name: hashed.stored_as for name, hashed in checkpoint.hash_embeddings.items()},
    )
    check_memory(spec)
    return Model(spec, TorchBackend(checkpoint, spec), host_tables(checkpoint))


def host_tables(checkpoint: Checkpoint) -> dict[str, list[npt.NDArray[Any]]]:
    """The hash tables of each graph as the runtime reads them, [rows, D] each, not copied; bfloat16 is viewed as
    uint16."""
    return {name: _as_read(hashed) for name, hashed in checkpoint.hash_embeddings.items()}


def _as_read(hashed: HashEmbedding) -> list[npt.NDArray[Any]]:
    tables = [hashed.table(t).detach() for t in range(hashed.config.n_tables)]
    return [(table.view(torch.uint16) if table.dtype == torch.bfloat16 else table).numpy() for table in tables]

"""Models that score text, from a checkpoint (PyTorch) or a bundle (ONNX Runtime)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blt.cli import devices, models
from blt.evaluate.scoring import Scorer, StreamScorer
from blt_runtime.errors import UsageError
from blt_runtime.patching import PatchRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blt_runtime.patching import EntropyDtype


@contextmanager
def open_stream(
    path: Path,
    n_ids: int,
    *,
    backend: str = "auto",
    entropy_model: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    entropy_dtype: EntropyDtype | None = None,
) -> Iterator[StreamScorer]:
    """A BLT as a stream for up to `n_ids` ids; a bundle's capacity is fixed and may be less."""
    with models.open_model(
        path,
        backend=backend,
        entropy_model=entropy_model,
        device=device,
        threads=threads,
        capacity=n_ids,
        entropy_dtype=entropy_dtype,
    ) as model:
        yield StreamScorer(model.stream(bos=False), model.spec.capacity_bytes)


@contextmanager
def open_scorer(
    path: Path,
    n_ids: int,
    *,
    backend: str = "auto",
    entropy_model: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    entropy_dtype: EntropyDtype | None = None,
) -> Iterator[Scorer]:
    """Any model for texts of up to `n_ids` ids: whole rows on PyTorch for checkpoints of every kind, a stream for a
    bundle, for --backend onnx, and (on the CPU) for texts longer than the model's rows, its `max_seqlen`."""
    models.check_backend(backend)
    models.existing(path)
    if models.is_bundle(path) or backend == "onnx":
        with open_stream(
            path,
            n_ids,
            backend=backend,
            entropy_model=entropy_model,
            device=device,
            threads=threads,
            entropy_dtype=entropy_dtype,
        ) as stream:
            yield stream
        return
    from blt.evaluate.rows import load_on, scorer_of

    chosen = "cpu" if device == "auto" else devices.torch_device(device)
    devices.limit_torch_threads(threads)
    yield scorer_of(load_on(chosen, path, entropy_model, entropy_dtype), n_ids, chosen)


@dataclass(frozen=True)
class Entropies:
    """Where the entropies of a text come from, and the patch rule that belongs to them (None: no rule known)."""

    entropies: Callable[[NDArray[np.int64]], NDArray[np.float32] | None]
    rule: PatchRule | None


@contextmanager
def open_entropies(
    path: Path, entropy_model: Path | None, threads: int | None, entropy_dtype: EntropyDtype | None = None
) -> Iterator[Entropies]:
    """The entropy model of a checkpoint (also of an entropy model alone) or of a bundle."""
    models.existing(path)
    if models.is_bundle(path):
        with open_stream(path, 0, entropy_model=entropy_model, threads=threads, entropy_dtype=entropy_dtype) as scorer:
            has_entropies = "entropy" in scorer.stream.spec.graphs
            rule = scorer.stream.spec.patch_rule
            yield Entropies(lambda ids_N: scorer(ids_N).entropies if has_entropies else None, rule)
        return
    yield _torch_entropies(path, entropy_model, threads, entropy_dtype)


def _torch_entropies(
    path: Path, entropy_model: Path | None, threads: int | None, entropy_dtype: EntropyDtype | None
) -> Entropies:
    import torch

    from blt.checkpoint.models import load
    from blt.model import entropy_of

    devices.limit_torch_threads(threads)
    checkpoint = load(path, entropy_model=entropy_model, entropy_dtype=entropy_dtype)
    if checkpoint.bpe is not None:
        checkpoint.require_blt()
    model, rule = checkpoint.entropy, checkpoint.patch_rule
    if model is None:
        return Entropies(lambda ids_N: None, rule)
    reset = rule is not None and rule.reset_newlines

    @torch.inference_mode()
    def entropies(ids_N: NDArray[np.int64]) -> NDArray[np.float32]:
        if len(ids_N) > model.config.max_seqlen:
            raise UsageError(
                f"the text has {len(ids_N)} bytes, the entropy model takes {model.config.max_seqlen}; shorten it"
            )
        logits_BNV = model(torch.from_numpy(ids_N)[None], reset_newlines=reset)
        return entropy_of(logits_BNV)[0].float().numpy()

    return Entropies(entropies, rule)

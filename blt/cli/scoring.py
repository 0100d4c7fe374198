"""Entropies, patches and logits of whole id sequences, from a checkpoint (PyTorch) or a bundle (ONNX Runtime)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blt.cli import devices, models
from blt_runtime.errors import UsageError
from blt_runtime.patching import PatchRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blt_runtime import Score, Stream
    from blt_runtime.patching import EntropyDtype


@dataclass(frozen=True)
class Scorer:
    """Call it with ids [N] and patch lengths [P] (None: the rule's). `capacity`: the longest N."""

    stream: Stream
    capacity: int

    def __call__(self, ids_N: NDArray[np.int64], lengths_P: NDArray[np.int64] | None = None) -> Score:
        return self.stream.score_ids(ids_N, lengths_P)


def bits_of(logits_NV: NDArray[np.float32], ids_N: NDArray[np.integer[Any]]) -> float:
    """Bits of ids 1..N-1 under the logits at the place before each."""
    x_NV = logits_NV[:-1].astype(np.float64)
    top_N = x_NV.max(-1)
    log_sum_N = top_N + np.log(np.exp(x_NV - top_N[:, None]).sum(-1))
    chosen_N = np.take_along_axis(x_NV, ids_N[1:, None], 1)[:, 0]
    return float((log_sum_N - chosen_N).sum() / math.log(2))


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
    """A scorer for up to `n_ids` ids; a bundle's capacity is fixed and may be less."""
    with models.open_model(
        path,
        backend=backend,
        entropy_model=entropy_model,
        device=device,
        threads=threads,
        capacity=n_ids,
        entropy_dtype=entropy_dtype,
    ) as model:
        yield Scorer(model.stream(bos=False), model.spec.capacity_bytes)


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
        with open_scorer(path, 0, entropy_model=entropy_model, threads=threads, entropy_dtype=entropy_dtype) as scorer:
            has_entropies = "entropy" in scorer.stream.spec.graphs
            rule = scorer.stream.spec.patch_rule
            yield Entropies(lambda ids_N: scorer(ids_N).entropies if has_entropies else None, rule)
        return
    yield _torch_entropies(path, entropy_model, threads, entropy_dtype)


def _torch_entropies(
    path: Path, entropy_model: Path | None, threads: int | None, entropy_dtype: EntropyDtype | None
) -> Entropies:
    import torch

    from blt.checkpoint import load
    from blt.model import entropy_of

    devices.limit_torch_threads(threads)
    checkpoint = load(path, entropy_model=entropy_model, entropy_dtype=entropy_dtype)
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

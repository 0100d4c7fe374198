"""Models that score text, from a checkpoint (PyTorch) or a bundle (ONNX Runtime)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blt.cli import devices, models
from blt.cli.inputs import is_bundle
from blt.cli.options import ModelOptions
from blt.evaluate.scoring import Scorer, StreamScorer
from blt_runtime.errors import UsageError
from blt_runtime.patching import PatchRule

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextmanager
def open_stream(path: Path, n_ids: int, how: ModelOptions) -> Iterator[StreamScorer]:
    """A BLT as a stream for up to `n_ids` ids; a bundle's capacity is fixed and may be less."""
    with models.open_model(path, how, capacity=n_ids) as model:
        yield StreamScorer(model.stream(bos=False), model.spec.capacity_bytes)


@contextmanager
def open_scorer(path: Path, n_ids: int, how: ModelOptions) -> Iterator[Scorer]:
    """A model of any kind for texts of up to `n_ids` ids.

    A checkpoint is scored in whole rows on PyTorch. A bundle, a checkpoint with --backend onnx, and on the CPU a BLT
    whose texts are longer than its rows (`max_seqlen`) are scored as a stream.
    """
    if is_bundle(path) or how.backend == "onnx":
        with open_stream(path, n_ids, how) as stream:
            yield stream
        return
    models.check_for_checkpoint(path, how)
    from blt.evaluate.rows import load_on, scorer_of

    device = "cpu" if how.device == "auto" else devices.torch_device(how.device)
    devices.limit_torch_threads(how.threads)
    yield scorer_of(
        load_on(device, path, entropy_model=how.entropy_model, entropy_dtype=how.entropy_dtype), n_ids, device
    )


@dataclass(frozen=True)
class Entropies:
    """A function from ids [N] to entropies [N] in nats (None: the model has none), and the model's own patch rule
    (None: an entropy model without one)."""

    entropies: Callable[[NDArray[np.int64]], NDArray[np.float32] | None]
    rule: PatchRule | None


@contextmanager
def open_entropies(path: Path, how: ModelOptions) -> Iterator[Entropies]:
    """The entropy model of a checkpoint (also of one that holds nothing else) or of a bundle."""
    if is_bundle(path):
        with open_stream(path, 0, how) as scorer:
            has_entropies = "entropy" in scorer.stream.spec.graphs
            rule = scorer.stream.spec.patch_rule
            yield Entropies(lambda ids_N: scorer(ids_N).entropies if has_entropies else None, rule)
        return
    models.check_for_checkpoint(path, how)
    yield _torch_entropies(path, how)


def _torch_entropies(path: Path, how: ModelOptions) -> Entropies:
    import torch

    from blt.checkpoint.models import load
    from blt.model import entropy_of

    devices.limit_torch_threads(how.threads)
    checkpoint = load(path, entropy_model=how.entropy_model, entropy_dtype=how.entropy_dtype)
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
                f"the text has {len(ids_N) - 1:,} bytes, the entropy model reads {model.config.max_seqlen - 1:,} at "
                "once; give a shorter text"
            )
        logits_BNV = model(torch.from_numpy(ids_N)[None], reset_newlines=reset)
        return entropy_of(logits_BNV)[0].float().numpy()

    return Entropies(entropies, rule)

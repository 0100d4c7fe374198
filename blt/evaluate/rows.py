"""Bits of texts from whole rows on PyTorch, for a BLT, a byte-level model or a token-level model.

Training computes whole rows, too. They are twice as fast as a stream and agree with streams up to rounding.

Letters: B rows (1), N ids, P patches, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from blt.checkpoint.models import Checkpoint, load
from blt.evaluate.scoring import Scored, Scorer, StreamScorer, Unit, patches_from, row_ids, scored
from blt.evaluate.texts import Document
from blt.model import BLT, EntropyModel, entropy_of
from blt.model.vocabulary import Vocabulary
from blt_runtime.errors import UsageError
from blt_runtime.ids import BOS, EOS
from blt_runtime.patching import EntropyDtype, PatchRule, patch_lengths

log = logging.getLogger(__name__)
GATHER_BYTES = 512 << 20
"""Most bytes of the encoder's gather (patches x longest patch x width). A stream scores text that would need more."""
Ids = NDArray[np.int64]


def load_on(
    device: str,
    path: str | Path,
    *,
    entropy_model: str | Path | None = None,
    entropy_dtype: EntropyDtype | None = None,
) -> Checkpoint:
    """A checkpoint of any kind for `scorer_of`, its models on `device`. See `blt.checkpoint.models.load`."""
    # Hash tables that are mapped from their file work on the CPU only.
    checkpoint = load(path, entropy_model=entropy_model, trainable=device != "cpu", entropy_dtype=entropy_dtype)
    for model in (checkpoint.blt, checkpoint.entropy, checkpoint.bpe):
        if model is not None:
            model.to(device)
    return checkpoint


def scorer_of(checkpoint: Checkpoint, n_ids: int | None = None, device: str = "cpu") -> Scorer:
    """A scorer for any checkpoint, on whole rows of up to the model's `max_seqlen` (training rows may be shorter).

    A BLT that must hold more ids (`n_ids`) is scored by a stream, at about half the speed. Streams run on the CPU; on
    another device, whole rows are used. Both are logged. device: where the checkpoint's models are (`load_on`).
    Raises CheckpointError for an incomplete checkpoint.
    """
    if checkpoint.bpe is not None and checkpoint.vocabulary is not None:
        return TokenRows(checkpoint.bpe, checkpoint.vocabulary, device)
    if checkpoint.blt is None and checkpoint.entropy is not None:
        return ByteRows(checkpoint.entropy, device)
    blt, rule = checkpoint.require_blt()
    rows = PatchRows(checkpoint, blt, rule, device=device)
    if n_ids is None or n_ids <= rows.n_ids:
        return rows
    if device == "cpu":
        log.info(
            "texts have up to %s bytes, a whole row of this model %s: they are scored as a stream, at about half the "
            "speed; --context %d avoids it", f"{n_ids - 2:,}", f"{rows.capacity:,}", rows.capacity,
        )  # fmt: skip
        return _stream(checkpoint, n_ids)
    log.warning(
        "on %s this model reads at most %s bytes at once; longer texts need the CPU", device, f"{rows.capacity:,}"
    )
    return rows


def _stream(checkpoint: Checkpoint, n_ids: int) -> StreamScorer:
    from blt.generate.torch_backend import open_model

    model = open_model(checkpoint, capacity=n_ids)
    return StreamScorer(model.stream(bos=False), model.spec.capacity_bytes)


@dataclass(frozen=True)
class ByteRows(Scorer):
    """Scores with a byte-level model: the entropy model of a run of kind entropy."""

    model: EntropyModel
    device: str = "cpu"
    unit: Unit = "byte"

    @property
    def capacity(self) -> int:
        return self.model.config.max_seqlen - 2

    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        ids_N = row_ids(prompt + text, eos, before)
        first = 1 + len(prompt)
        return scored(_logits(self.model, ids_N, self.device), ids_N, first, len(ids_N) - first)


@dataclass(frozen=True)
class TokenRows(Scorer):
    """Scores with a token-level model. No token spans the end of a prompt. The bits are those of the text's own
    tokenisation, an upper bound: the model's probability of the text is the sum over all tokenisations."""

    model: EntropyModel
    vocabulary: Vocabulary
    device: str = "cpu"
    unit: Unit = "token"

    @property
    def capacity(self) -> int:
        return self.model.config.max_seqlen - 2  # a token has at least one byte

    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        earlier, asked, counted = self.vocabulary.encode_all([before, prompt, text])
        return self._measure(np.concatenate([earlier[-1:], asked, counted]), len(counted), eos, bos=not before)

    def measure_pieces(self, document: Document, context: int, continued: bool = False) -> Iterator[tuple[Scored, int]]:
        """A piece that is `continued` holds the tokens of the whole document that end in its bytes."""
        if not continued:
            yield from super().measure_pieces(document, context)
            return
        _, text, prompt, whole = document
        asked, counted = self.vocabulary.encode_all([text[:prompt], text[prompt:]])
        tokens_T = np.concatenate([asked, counted])
        ends_T = np.cumsum(self.vocabulary.token_bytes[tokens_T])
        for start in range(0, len(text), context):
            last = whole and start + context >= len(text)
            first, end = np.searchsorted(ends_T, [start, start + context], side="right")
            own = max(0, int(end - max(first, len(asked))))
            if own or last:
                row = tokens_T[max(first - 1, 0) : end]
                n_bytes = self.vocabulary.token_bytes[tokens_T[end - own : end]].sum()
                yield self._measure(row, own, last, bos=not first), int(n_bytes)

    def _measure(self, tokens_T: Ids, n_counted: int, eos: bool, bos: bool) -> Scored:
        ids_N = np.concatenate([[BOS] if bos else [], tokens_T, [EOS] if eos else []]).astype(np.int64)
        first = len(ids_N) - n_counted - eos
        return scored(_logits(self.model, ids_N, self.device), ids_N, first, len(ids_N) - first)


@dataclass(frozen=True)
class PatchRows(Scorer):
    """Scores with a BLT and its patch rule."""

    checkpoint: Checkpoint
    blt: BLT
    rule: PatchRule
    device: str = "cpu"
    unit: Unit = "patch"

    @cached_property
    def n_ids(self) -> int:
        """Most ids of a row."""
        limits = [self.blt.config.encoder.max_seqlen, self.blt.config.decoder.max_seqlen]
        if self.rule.needs_entropy and self.checkpoint.entropy is not None:
            limits.append(self.checkpoint.entropy.config.max_seqlen)
        return min(limits)

    @property
    def capacity(self) -> int:
        return self.n_ids - 2

    @cached_property
    def stream(self) -> StreamScorer:
        log.info("texts with very many or very long patches are scored as a stream, at about half the speed")
        return _stream(self.checkpoint, self.n_ids)

    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        ids_N = row_ids(prompt + text, eos, before)
        _check_length(ids_N, self.n_ids)
        lengths_P = self._patches(ids_N)
        longest, first = int(lengths_P.max()), 1 + len(prompt)
        too_long = len(lengths_P) > self.blt.config.latent.max_seqlen
        if too_long or 4 * len(lengths_P) * longest * self.blt.config.local_dim > GATHER_BYTES:
            self._check_stream(len(lengths_P), longest)
            return self.stream.measure(text, prompt, eos, before)
        with torch.inference_mode():
            logits_BNV = self.blt(_row(ids_N, self.device), _row(lengths_P, self.device), longest)
        return scored(logits_BNV[0].cpu().numpy(), ids_N, first, patches_from(lengths_P, first, len(ids_N)))

    def _check_stream(self, patches: int, longest: int) -> None:
        if self.device != "cpu":
            raise UsageError(
                f"a text of {patches} patches, the longest of {longest} bytes, does not fit into a row of this model "
                f"on {self.device}, and streams run on the CPU: use --device cpu or a smaller --context"
            )

    def _patches(self, ids_N: Ids) -> Ids:
        entropies_N = None
        if self.rule.needs_entropy:
            assert self.checkpoint.entropy is not None
            with torch.inference_mode():
                logits_BNV = self.checkpoint.entropy(_row(ids_N, self.device), self.rule.reset_newlines)
                entropies_N = entropy_of(logits_BNV)[0].cpu().numpy()
        return patch_lengths(self.rule, ids_N, entropies_N)


def _row(values: Ids, device: str) -> torch.Tensor:
    return torch.as_tensor(values, device=device)[None]


def _logits(model: EntropyModel, ids_N: Ids, device: str) -> NDArray[np.float32]:
    _check_length(ids_N, model.config.max_seqlen)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(_row(ids_N, device))[0].float().cpu().numpy()
    return logits


def _check_length(ids_N: Ids, limit: int) -> None:
    if len(ids_N) > limit:
        raise UsageError(
            f"the text has {len(ids_N):,} ids with special ones, and the model reads {limit:,} at once; "
            "give a shorter text"
        )

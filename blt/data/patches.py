"""Patch boundaries ahead of the step: entropies of whole splits by the frozen entropy model, cached beside the data.

Definition used for training. Each document (BOS, bytes, EOS) is evaluated alone, in float32. One that is longer than a
row of 4 windows is cut into pieces that overlap by one window, and the overlap's entropies come from the earlier piece.
So every token has at least a full window of its own document in front of it, as in generation; what the deeper layers
know of the text before that window starts afresh with the piece (a test bounds what that changes; one layer is exact).
The overlap costs a third. Pieces that overlap by the whole receptive field, n_layers x window, would be exact and cost
n_layers times that.

Entropies are stored, not boundaries: another threshold or rule then costs nothing. The file is keyed by the entropy
model's weights, its configuration and the shards' checksums.

Letters: B rows, N tokens of a row, W window.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blt.calibrate import Piece, find_rule
from blt.data.dataset import Dataset, Documents
from blt.model import EntropyModel, entropy_of
from blt_runtime.errors import ConfigError, InputError, UsageError
from blt_runtime.patching import PatchRule, patch_lengths

DEFINITION = 1
ROWS = 8
GROUP_TOKENS = 1 << 20
LONGEST_ROW = 8192
CACHE_FOLDER = "entropies"
Float = NDArray[np.float32]
Ids = NDArray[np.int16]
log = logging.getLogger("blt.data")


@dataclass(frozen=True)
class _Piece:
    """Tokens [begin, end) of one document; entropies are kept from `keep` on."""

    document: int
    begin: int
    keep: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def document_entropies(
    model: EntropyModel, documents: Sequence[Ids], reset_newlines: bool = False, compile: bool = False
) -> list[Float]:
    """Next-byte entropies in nats of each document's tokens (BOS ... EOS), float32 [length] each, as defined above."""
    window = model.config.window or model.config.max_seqlen
    row = min(max(512, 4 * window), LONGEST_ROW, model.config.max_seqlen)
    found = [np.empty(len(ids), np.float32) for ids in documents]
    rows = _pack(_pieces([len(ids) for ids in documents], row, min(window, row // 2)), row)
    evaluate = _Evaluator(model, reset_newlines, compile)
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        ids_BN = np.zeros((ROWS, row), np.int64)
        for ids_N, pieces in zip(ids_BN, part, strict=False):
            for at, piece in _places(pieces):
                ids_N[at : at + piece.length] = documents[piece.document][piece.begin : piece.end]
        entropy_BN = evaluate(ids_BN)
        for entropy_N, pieces in zip(entropy_BN, part, strict=False):
            for at, piece in _places(pieces):
                kept = entropy_N[at + piece.keep - piece.begin : at + piece.length]
                found[piece.document][piece.keep : piece.end] = kept
    return found


class _Evaluator:
    """Token ids [B, N] to entropies [B, N]."""

    def __init__(self, model: EntropyModel, reset_newlines: bool, compile: bool):
        self.model, self.reset_newlines = model, reset_newlines
        self.device = next(model.parameters()).device
        self._entropies = torch.compile(self._plain, fullgraph=True, dynamic=False) if compile else self._plain

    def _plain(self, ids_BN: torch.Tensor) -> torch.Tensor:
        return entropy_of(self.model(ids_BN, self.reset_newlines))

    @torch.no_grad()
    def __call__(self, ids_BN: NDArray[np.int64]) -> Float:
        entropies: Float = self._entropies(torch.as_tensor(ids_BN, device=self.device)).cpu().numpy()
        return entropies


def _pieces(lengths: Iterable[int], row: int, window: int) -> list[_Piece]:
    """Documents cut into pieces of at most `row` tokens; all but a document's last piece fill a row."""
    pieces = []
    for document, length in enumerate(lengths):
        keep = 0
        while keep < length:
            begin = max(0, keep - window)
            end = min(begin + row, length)
            pieces.append(_Piece(document, begin, keep, end))
            keep = end
    return pieces


def _pack(pieces: list[_Piece], row: int) -> list[list[_Piece]]:
    """Pieces into rows, longest first into the first row with room. What follows a piece in its row must not see it,
    which the mask ensures behind an EOS; a piece without one fills its row, so nothing follows it."""
    rows: list[list[_Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        place = next((r for r, free in enumerate(room) if free >= piece.length), None)
        if place is None:
            rows.append([])
            room.append(row)
            place = len(rows) - 1
        rows[place].append(piece)
        room[place] -= piece.length
    return rows


def _places(pieces: list[_Piece]) -> list[tuple[int, _Piece]]:
    starts = np.cumsum([0, *(piece.length for piece in pieces)])
    return [(int(at), piece) for at, piece in zip(starts, pieces, strict=False)]


class PatchIndex:
    """Patch boundaries of every document of a split, under a rule.

    `model` is needed for rules that look at entropies; those are computed at first use and cached in the data folder.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        model: EntropyModel | None = None,
        *,
        reset_newlines: bool = False,
        rule: PatchRule | None = None,
        compile: bool = False,
    ):
        self.dataset, self.split, self.model, self.rule = dataset, split, model, rule
        self.reset_newlines, self.compile = reset_newlines, compile
        self.documents = dataset.split(split)
        self.key = "" if model is None else _key(model, reset_newlines)
        self._entropies: Float | None = None

    def with_rule(self, rule: PatchRule) -> PatchIndex:
        """The same entropies under a rule."""
        if rule.needs_entropy and (self.model is None or rule.reset_newlines != self.reset_newlines):
            raise ConfigError("this patch rule needs entropies of another kind; give the entropy model it was made for")
        other = PatchIndex(self.dataset, self.split, rule=rule)
        other.model, other.reset_newlines, other.key = self.model, self.reset_newlines, self.key
        other._entropies, other.compile = self._entropies, self.compile
        return other

    def compute(self) -> None:
        """Makes or opens the cache now, and not at the first document asked for."""
        if self.model is not None and self._entropies is None and len(self.documents):
            self._entropies = self._load()

    def starts(self, document: int) -> NDArray[np.bool_]:
        """True where a patch begins, [length + 2] over BOS ... EOS."""
        assert self.rule is not None
        entropies = self.entropies(document) if self.rule.needs_entropy else None
        lengths = patch_lengths(self.rule, self.documents.ids(document), entropies, include_next_token=False)
        starts = np.zeros(int(lengths.sum()), np.bool_)
        starts[np.cumsum(lengths) - lengths] = True
        return starts

    def entropies(self, document: int) -> Float:
        """Next-byte entropies in nats, [length + 2]."""
        self.compute()
        assert self._entropies is not None
        begin, end = self.documents.token_offsets[document : document + 2]
        return self._entropies[begin:end]

    @property
    def path(self) -> Path:
        """The cache file of this split."""
        data = hashlib.sha256("".join(self.documents.sha256).encode()).hexdigest()[:8]
        return self.dataset.folder / CACHE_FOLDER / f"{self.split}-{data}-{self.key[:24]}.npy"

    def _load(self) -> Float:
        if not self.path.exists():
            _write(self.path, self._compute())
        entropies: Float = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if entropies.shape != (int(self.documents.token_offsets[-1]),):
            raise InputError(f"{self.path} does not fit the data; delete it and run again")
        return entropies

    def _compute(self) -> Float:
        assert self.model is not None
        offsets = self.documents.token_offsets
        entropies = np.empty(int(offsets[-1]), np.float32)
        began = time.monotonic()
        for members in _groups(self.documents):
            ids = [self.documents.ids(index) for index in members]
            found = document_entropies(self.model, ids, self.reset_newlines, self.compile)
            for index, entropies_N in zip(members, found, strict=True):
                entropies[offsets[index] : offsets[index + 1]] = entropies_N
            done = int(offsets[members[-1] + 1])
            rate = done / max(time.monotonic() - began, 1e-9)
            log.info("entropies of %s: %.0f %%, %.0f bytes/s", self.split, 100 * done / len(entropies), rate)
        return entropies


def _groups(documents: Documents) -> Iterable[list[int]]:
    """Runs of documents of about GROUP_TOKENS, packed into rows together."""
    starts = documents.token_offsets[:-1]
    cuts = np.flatnonzero(np.diff(starts // GROUP_TOKENS)) + 1
    return [part.tolist() for part in np.split(np.arange(len(documents)), cuts) if len(part)]


def _key(model: EntropyModel, reset_newlines: bool) -> str:
    what: dict[str, Any] = {"model": model.config.model_dump(mode="json"), "definition": DEFINITION}
    digest = hashlib.sha256(json.dumps(what | {"reset_newlines": reset_newlines}, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, array: Float) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npy")
    try:
        np.save(temporary, array)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def choose_threshold(
    index: PatchIndex,
    rule: PatchRule,
    target: float,
    members: Sequence[int] | NDArray[np.int64],
    sample_tokens: int = 2 << 20,
) -> float:
    """The threshold (nats) at which `rule` gives the mean patch closest to `target` bytes on a sample of `members`.

    Bytes per patch are those of `blt.calibrate` and `blt eval`. Raises ConfigError if no threshold reaches the target.
    """
    sample = _sample(index.documents, members, sample_tokens)
    try:
        found = find_rule(rule, [Piece(index.documents.ids(i), index.entropies(i)) for i in sample], target)
    except UsageError as error:
        raise ConfigError(f"{error}; change patching.target_patch_size or patching.max_patch_length") from None
    assert found.threshold is not None
    return found.threshold


def _sample(documents: Documents, members: Sequence[int] | NDArray[np.int64], tokens: int) -> list[int]:
    order = np.random.default_rng(0).permutation(np.asarray(members))
    total = np.cumsum(documents.lengths[order] + 2)
    return [int(index) for index in order[: int(np.searchsorted(total, tokens)) + 1]]

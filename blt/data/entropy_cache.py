"""Entropies of a split's documents by a frozen model, computed for the documents that are needed and kept.

The file next to the data has a place for every token of the split. Entropies are computed in whole chunks at fixed
places of the split, so their bits do not depend on what was computed before, or in which order. The key covers the
model's weights and configuration, the shards' bytes and the ends of documents.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import cached_property
from typing import Any

import numpy as np

from blt.checkpoint.models import weights_of
from blt.data.batches import Int, never
from blt.data.cache_files import GrowingArray, Spans
from blt.data.dataset import Dataset
from blt.data.entropies import EntropyPass, Float, make_pass
from blt.data.quantities import amount, duration
from blt.model import EntropyModel

DEFINITION = 2
"""1: pieces of 4 windows that overlap by one window, so that deeper layers lacked the context before it. 2: exact."""
CACHE_FOLDER = "entropies"
LOG_SECONDS = 5.0
log = logging.getLogger("blt.data")


class EntropyCache:
    """The entropies of one split. They are computed at first use, or ahead of it by `compute`."""

    def __init__(self, dataset: Dataset, split: str, model: EntropyModel, reset_newlines: bool, compile: bool):
        self.split, self.model = split, model
        self.reset_newlines, self.compile = reset_newlines, compile
        self.documents = dataset.split(split)
        self.key = entropy_key(model, reset_newlines)
        data = hashlib.sha256("".join(self.documents.text_sha256).encode()).hexdigest()[:8]
        self.path = dataset.folder / CACHE_FOLDER / f"{split}-{data}-{self.key[:24]}.npy"

    @cached_property
    def _values(self) -> GrowingArray:
        """Opened late: a damaged file is an error of its first use."""
        return GrowingArray(self.path, int(self.documents.token_offsets[-1]))

    def has(self, members: Int) -> bool:
        """Whether the entropies of all these documents are computed."""
        return self._values.complete or all(self._has(int(document)) for document in members)

    def compute(self, members: Int, stopped: Callable[[], bool] = never) -> None:
        """Computes the entropies of these documents that are not in the file yet.

        Raises InputError if the file cannot be written or is damaged, and CancelledError after the chunk in which
        `stopped()` becomes true; what was computed is kept.
        """
        if not self.has(members):
            self._values.fill(lambda: self._missing(members), lambda spans: self._computed(spans, stopped))

    def of(self, document: int) -> Float:
        """Next-byte entropies in nats of a document, [length + 2]."""
        self.compute(np.array([document]))
        begin, end = self._tokens(document)
        return self._values[begin:end]

    def of_all(self, members: Int) -> Float:
        """Next-byte entropies in nats of the tokens of these documents, one after another."""
        self.compute(members)
        offsets = self.documents.token_offsets
        pieces = zip(offsets[members].tolist(), offsets[members + 1].tolist(), strict=True)
        return np.concatenate([np.empty(0, np.float32), *(self._values[begin:end] for begin, end in pieces)])

    def missing_bytes(self, members: Int) -> int:
        """Bytes of these documents whose entropies are not computed."""
        missing = [int(document) for document in members if not self._has(int(document))]
        return int(self.documents.lengths[missing].sum())

    def _tokens(self, document: int) -> tuple[int, int]:
        begin, end = self.documents.token_offsets[document : document + 2]
        return int(begin), int(end)

    def _has(self, document: int) -> bool:
        return self._values.has(*self._tokens(document))

    @cached_property
    def _pass(self) -> EntropyPass:
        return make_pass(
            self.model, len(self.documents.tokens), reset_newlines=self.reset_newlines, compile=self.compile
        )

    def _missing(self, members: Int) -> Spans:
        """The missing chunks of these documents, as disjoint spans in ascending order."""
        spans: Spans = []
        for document in np.unique(members):
            if not self._has(int(document)):
                for begin, end in self._chunks(*self._tokens(int(document))):
                    if not self._values.has(begin, end):
                        if spans and begin <= spans[-1][1]:
                            begin = spans.pop()[0]
                        spans.append((begin, end))
        return spans

    def _chunks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The chunks of the pass that cover tokens [begin, end); a pass without chunks computes all at once."""
        chunk, length = self._pass.chunk, len(self.documents.tokens)
        if chunk == 1:
            yield begin, end
            return
        for at in range(begin // chunk * chunk, end, chunk):
            yield at, min(length, at + chunk)

    def _computed(self, spans: Spans, stopped: Callable[[], bool]) -> Iterator[tuple[int, Float]]:
        progress = Progress(f"entropies of {self.split}", sum(end - begin for begin, end in spans), self.compile)
        for begin, end in spans:
            at = begin
            for values in self._pass.run(self.documents.tokens, begin, end):
                yield at, values
                if stopped():
                    raise CancelledError
                at += len(values)
                progress.add(len(values))


class Progress:
    """Logs the share that is done and the time left: after the second chunk, then every few seconds.

    The first chunk is not counted in the rate, since the model is compiled in it.
    """

    def __init__(self, what: str, total: int, compile: bool):
        self.what, self.total, self.done = what, total, 0
        self._first, self._began, self._logged = 0, time.monotonic(), 0.0
        if compile:
            log.info("compiling the entropy model ...")

    def add(self, tokens: int) -> None:
        self.done += tokens
        now = time.monotonic()
        if not self._first:
            self._first, self._began = self.done, now
        elif now - self._logged >= LOG_SECONDS and self.done < self.total:
            rate = (self.done - self._first) / max(now - self._began, 1e-9)
            log.info(
                "%s: %s of %s, %s/s, %s left",
                self.what, amount(self.done), amount(self.total), amount(rate),
                duration((self.total - self.done) / rate),
            )  # fmt: skip
            self._logged = now


def entropy_key(model: EntropyModel, reset_newlines: bool) -> str:
    """A hash of an entropy model's weights and configuration, and of how it is evaluated."""
    what: dict[str, Any] = {"model": model.config.model_dump(mode="json"), "definition": DEFINITION}
    what["arithmetic"] = str(next(model.parameters()).dtype)  # a bfloat16 copy may have the same weights
    digest = hashlib.sha256(json.dumps(what | {"reset_newlines": reset_newlines}, sort_keys=True).encode())
    for name, tensor in sorted(weights_of(model).items()):
        digest.update(name.encode())
        for block in tensor.blocks():
            digest.update(block.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()

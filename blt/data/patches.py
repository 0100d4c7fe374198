"""Patch boundaries ahead of the step: entropies of whole splits by the frozen entropy model, cached next to the data.

For training, each document (BOS, bytes, EOS) is evaluated alone and exactly, as in generation (`blt.data.entropies`).
The first version of the cache cut long documents into overlapping pieces; see DEFINITION.

The cache stores entropies, not boundaries, so another threshold or rule costs nothing. Its key covers the entropy
model's weights and configuration, the shards' bytes and the ends of documents. It is written as it is computed
(`blt.data.cache_files`): a killed run continues where it stopped, and a second run starts at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.data.cache_files import fill_array
from blt.data.dataset import Dataset, Documents
from blt.data.entropies import Float, make_pass
from blt.data.threshold import Piece, find_rule
from blt.model import EntropyModel
from blt_runtime import reading
from blt_runtime.errors import ConfigError, InputError, UsageError
from blt_runtime.patching import PatchRule, patch_lengths

DEFINITION = 2
"""1: pieces of 4 windows that overlap by one window, so that deeper layers lacked the context before it. 2: exact."""
CACHE_FOLDER = "entropies"
LOG_SECONDS = 5.0
log = logging.getLogger("blt.data")


class PatchIndex:
    """Patch boundaries of every document of a split under a rule.

    `model` is needed for rules that use entropies. These are computed at first use and cached in the data folder.
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
        """The same entropies under another rule. Raises ConfigError if the rule needs other entropies."""
        if rule.needs_entropy and (self.model is None or rule.reset_newlines != self.reset_newlines):
            raise ConfigError("this patch rule needs other entropies; give the entropy model it was made for")
        other = PatchIndex(self.dataset, self.split, rule=rule)
        other.model, other.reset_newlines, other.key = self.model, self.reset_newlines, self.key
        other._entropies, other.compile = self._entropies, self.compile
        return other

    def compute(self) -> None:
        """Makes or opens the cache now, instead of at the first access to a document."""
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
        data = hashlib.sha256("".join(self.documents.text_sha256).encode()).hexdigest()[:8]
        return self.dataset.folder / CACHE_FOLDER / f"{self.split}-{data}-{self.key[:24]}.npy"

    def _load(self) -> Float:
        length = int(self.documents.token_offsets[-1])
        if self.path.exists():
            log.info("entropies of %s: read from %s", self.split, self.path)
        else:
            self._fill()
        try:
            entropies: Float = reading.read_array(self.path, mapped=True)
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path} is damaged ({reading.reason(error)}); delete it and run again") from error
        if entropies.shape != (length,) or entropies.dtype != np.float32:
            raise InputError(f"{self.path} does not fit the data; delete it and run again")
        return entropies

    def _fill(self) -> None:
        assert self.model is not None
        tokens = self.documents.tokens
        entropy_pass = make_pass(self.model, len(tokens), self.reset_newlines, self.compile)

        def compute(done: int) -> Iterator[Float]:
            progress = _Progress(self.split, len(tokens), done)
            for entropies_C in entropy_pass.run(tokens, done):
                yield entropies_C
                progress.add(len(entropies_C))

        fill_array(self.path, len(tokens), entropy_pass.chunk, compute)


class _Progress:
    """Logs the progress every few seconds."""

    def __init__(self, split: str, total: int, done: int):
        self.split, self.total, self.first, self.done = split, total, done, done
        self._began = time.monotonic()
        self._logged = 0.0
        if done:
            log.info("entropies of %s: continuing at %.1f %%", split, 100 * done / total)

    def add(self, tokens: int) -> None:
        self.done += tokens
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS and self.done < self.total:
            return
        rate = (self.done - self.first) / max(now - self._began, 1e-9)
        left = (self.total - self.done) / rate
        log.info(
            "entropies of %s: %.1f %%, %.0f bytes/s, %.0f s left", self.split, 100 * self.done / self.total, rate, left
        )
        self._logged = now


def _key(model: EntropyModel, reset_newlines: bool) -> str:
    what: dict[str, Any] = {"model": model.config.model_dump(mode="json"), "definition": DEFINITION}
    what["arithmetic"] = str(next(model.parameters()).dtype)  # a bfloat16 copy may have the same weights
    digest = hashlib.sha256(json.dumps(what | {"reset_newlines": reset_newlines}, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def choose_threshold(
    index: PatchIndex,
    rule: PatchRule,
    target: float,
    members: Sequence[int] | NDArray[np.int64],
    sample_tokens: int = 2 << 20,
) -> float:
    """The threshold in nats at which the mean patch size of `rule` is closest to `target` bytes, on a sample of
    `members`.

    Bytes per patch are counted as in `blt calibrate` and `blt eval`. Raises ConfigError if no threshold reaches the
    target.
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

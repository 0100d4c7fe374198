"""One text in the making: takes bytes in, one by one or many at once, and says what comes next.

`Stream._step` is the whole algorithm for one token. Three clocks tick: the entropy model, encoder and
decoder once per byte, the latent transformer once per finished patch; the unfinished patch is never
computed because nobody reads it (spec section 5). All calls of a step are bound beforehand, so a step
allocates nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends.protocol import Array, Backend
from .drafters import Drafter
from .errors import CapacityError, InputError, UsageError
from .hashing import Tables
from .ids import BOS, EOS, OFFSET, Ids, encode
from .memory import Mark, Memory
from .patching import closes_from_lengths
from .patching import patch_lengths as rule_lengths
from .prefill import Prefill
from .sampling import Sampler, generator
from .snapshot import Snapshot, put, take
from .spec import ModelSpec
from .speculate import Speculate, Speculation, SpeculationStats, Speculator
from .step import StepCalls
from .text import StopMatcher

DRAFT = 8
"""Ids guessed ahead at most; patches are about 5 bytes long."""
BYTES = [b""] * OFFSET + [bytes([value]) for value in range(256)]


@dataclass(frozen=True)
class Score:
    """What a model makes of ids [N]: entropies [N] in nats (NaN without an entropy model), patch lengths
    [P] whose sum is N + 1 (the last patch holds one virtual token), logits [N, V] float32 where row t
    predicts id t + 1."""

    ids: Ids
    entropies: Array
    patch_lengths: Ids
    logits: Array


class Stream:
    """Owns all state of one text. Made by `Model.stream`; many streams share a model, one thread uses a
    stream at a time.

    bos: begin with BOS, also after `reset`. seed: of the generator that draws when a call names no seed of
    its own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        hash_tables: Tables | None = None,
        bos: bool = True,
        seed: int | None = None,
    ) -> None:
        self.spec = spec
        self._owner = backend
        self._memory = Memory(spec, backend, hash_tables)
        self._calls = StepCalls(self._memory)
        self._prefill = Prefill(self._memory)
        self._speculator = Speculator(self._memory, self._calls)
        self._turns = 0
        self._random = generator(seed)
        self._bos = bos
        self._with_entropy = spec.patch_rule.needs_entropy
        self._lock = threading.Lock()
        self._damaged = False
        self.reset()

    @property
    def position(self) -> int:
        """Tokens taken in, BOS included."""
        return self._memory.position

    @property
    def ids(self) -> Ids:
        """The tokens taken in [N] (a copy)."""
        return self._memory.ids_N.copy()

    @property
    def logits(self) -> Array:
        """Next-byte logits [V] float32: a view that the next token overwrites."""
        if self.position == 0:
            raise UsageError("the stream is empty: append something first, or open it with bos=True")
        return self._calls.logits_V

    @property
    def speculation(self) -> SpeculationStats:
        """What speculation has done on this stream so far."""
        return self._speculator.stats

    @property
    def patch_lengths(self) -> Ids:
        """Patch lengths [P]; they sum to position + 1, the last patch holds one virtual next token."""
        memory = self._memory
        return np.diff([*memory.starts_P[: memory.patches + 1], memory.position + 1]).astype(np.int64)

    def append(self, text: str | bytes) -> None:
        """Takes in text or bytes. Raises CapacityError (nothing changed) if they do not fit."""
        self.append_ids(encode(text, bos=False))

    def append_ids(self, ids: npt.ArrayLike) -> None:
        """Takes in ids [N]. Raises InputError for foreign ids, CapacityError (nothing changed) if they do not fit."""
        ids_N = _checked(ids, self.spec.vocab_size)
        with self._exclusive():
            self._take(ids_N)

    def reset(self) -> None:
        """Forgets everything, and begins again (with BOS if the stream was opened with it)."""
        with self._exclusive(repair=True):
            self._start()

    def rewind(self, n_tokens: int) -> None:
        """Takes back the last `n_tokens` tokens, exactly as if they had never come.

        Costs the tail behind a patch boundary if the caches still reach back there, and else a replay of
        everything.
        """
        if not 0 <= n_tokens <= self.position:
            raise UsageError(f"cannot rewind {n_tokens} of {self.position} tokens")
        with self._exclusive():
            if n_tokens:
                self._return_to(self.position - n_tokens)

    def snapshot(self) -> Snapshot:
        """The present state, to `restore` here or in other streams of the same model without computing it again."""
        with self._exclusive():
            return take(self._memory, self._owner, self._calls.logits_V)

    def restore(self, snapshot: Snapshot) -> None:
        """Makes the stream what it was, or another stream of the model was, at `snapshot`, to the last bit.

        Raises UsageError (nothing changed) for a snapshot of another model.
        """
        if not snapshot.is_of(self.spec, self._owner):
            raise UsageError("this snapshot was taken from a stream of another model: take one from this model's")
        with self._exclusive(repair=True):
            put(snapshot, self._memory, self._calls.logits_V)
            self._calls.read_patches()

    def generate(
        self,
        n: int,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: Iterable[str | bytes] | str | bytes | None = None,
        stop_at_eos: bool = True,
        speculate: Speculate | Drafter = "off",
        draft: int = DRAFT,
    ) -> Iterator[bytes]:
        """Generates up to `n` tokens, yielding bytes as they come (b"" for a special id, or while bytes are
        held back because they may begin a stop string). Every token is taken into the stream before its
        bytes come out, a stop string too; an EOS that ends the text is not.

        speculate, draft: see `generate_ids`.
        """
        random = self._random if seed is None else seed
        sampler, matcher = Sampler(temperature, top_k, top_p, min_p, random), StopMatcher(stop)
        return self._generate_bytes(self.generate_ids(n, sampler, stop_at_eos, speculate, draft), matcher)

    def generate_ids(
        self,
        n: int,
        sampler: Sampler | None = None,
        stop_at_eos: bool = False,
        speculate: Speculate | Drafter = "off",
        draft: int = DRAFT,
    ) -> Iterator[int]:
        """Generates up to `n` ids (greedily without a sampler); each is in the stream when it is yielded.

        speculate: guess up to `draft` ids ahead and check them in one pass. The same ids come out as with
        "off"; only "entropy" with a temperature draws others, from the same distribution. "entropy" lets the entropy
        model guess, "lookup" what followed the same bytes earlier, "auto" both while they pay; or a Drafter.

        Raises CapacityError when the stream is full, UsageError if it is empty, or cannot speculate so.
        """
        if n < 0:
            raise UsageError("n must not be negative")
        _ = self.logits
        sampler = sampler or Sampler()
        ahead = None if speculate == "off" else self._speculator.start(speculate, draft, sampler)
        return self._generate_ids(n, sampler, stop_at_eos, ahead)

    def score_ids(self, ids: npt.ArrayLike, patch_lengths: npt.ArrayLike | None = None) -> Score:
        """Runs ids [N], taken as they are, through the emptied stream and returns everything it computes on
        the way.

        patch_lengths [P] (first 1, sum N + 1) take the place of the patch rule. The stream is reset
        afterwards.
        """
        ids_N = _checked(ids, self.spec.vocab_size)
        if not len(ids_N):
            raise InputError("there is nothing to score: no ids")
        closes_N = None if patch_lengths is None else _checked_closes(patch_lengths, len(ids_N))
        if closes_N is None and self.spec.patch_rule.scheme == "bpe":  # a delimiter in last place closes nothing
            closes_N = closes_from_lengths(rule_lengths(self.spec.patch_rule, ids_N))
        logits_NV = np.empty((len(ids_N), self.spec.vocab_size), dtype=np.float32)
        with self._exclusive(repair=True):
            self._memory.clear()
            try:
                self._memory.check_room(len(ids_N))
                self._prefill.run(ids_N, closes_N, "entropy" in self.spec.graphs, logits_NV)
                entropies_N = self._memory.entropies.array[0, : len(ids_N)].copy()
                return Score(ids_N, entropies_N, self.patch_lengths, logits_NV)
            finally:
                self._start()

    def _start(self) -> None:
        self._memory.clear()
        self._calls.read_patches()
        if self._bos:
            self._step(BOS)

    def _generate_ids(self, n: int, sampler: Sampler, stop_at_eos: bool, ahead: Speculation | None) -> Iterator[int]:
        turns = -1
        for _ in range(n):
            with self._exclusive():
                if ahead is not None and self._turns != turns + 1:
                    ahead.forget()  # somebody else has used the stream since
                turns = self._turns
                id = sampler(self._calls.logits_V) if ahead is None else ahead.choose()
                if stop_at_eos and id == EOS:
                    return
                if ahead is None:
                    self._step(id)
                else:
                    ahead.take(id)
            yield id

    def _generate_bytes(self, ids: Iterator[int], matcher: StopMatcher) -> Iterator[bytes]:
        for id in ids:
            yield matcher.feed(BYTES[id])
            if matcher.stopped:
                return
        if rest := matcher.flush():
            yield rest

    def _take(self, ids_N: Ids) -> None:
        if len(ids_N) == 1:
            return self._step(int(ids_N[0]))
        if len(ids_N) == 0:
            return None
        memory = self._memory
        memory.check_room(len(ids_N))
        before = memory.position
        try:
            self._calls.logits_V[:] = self._prefill.run(ids_N, None, self._with_entropy, None)
        except CapacityError:
            if before and self._with_entropy:  # the entropy cache has run ahead
                self._return_to(before, entropy_end=before + len(ids_N))
            raise
        self._calls.read_patches()
        return None

    def _return_to(self, tokens: int, entropy_end: int | None = None) -> None:
        """Makes the stream what it was after `tokens` tokens."""
        memory = self._memory
        ids_N = memory.ids_N[:tokens].copy()
        if not memory.go_back(tokens, entropy_end) or tokens == 0:
            memory.clear()
        self._calls.read_patches()
        self._take(ids_N[memory.position :])

    def _step(self, id: int) -> None:
        """Takes in one token. Everything that the next byte depends on is computed here."""
        memory, calls = self._memory, self._calls
        memory.check_room(1)
        t = memory.position
        calls.set_token(id, t)
        entropy = 0.0
        if self._with_entropy:
            calls.entropy()
            entropy = calls.entropy_of(t)
        if memory.hash is not None:
            memory.hash.one(memory.window(t, t + 1), calls.hash_D)
        calls.encoder()
        calls.keep_state(t)
        memory.position = t + 1
        if memory.rule.closes(id, entropy):
            calls.latent(t + 1)
            memory.marks.append(Mark(t + 1, memory.patches, memory.rule.copy()))
        calls.decoder()

    @contextmanager
    def _exclusive(self, repair: bool = False) -> Iterator[None]:
        """One thread at a time; a call that failed half-way leaves a stream that only `reset` accepts."""
        if not self._lock.acquire(blocking=False):
            raise UsageError("another thread is using this stream: give each thread its own")
        if self._damaged and not repair:
            self._lock.release()
            raise UsageError("an earlier call on this stream failed half-way: call reset() first")
        self._damaged = True
        self._turns += 1
        try:
            yield
            self._damaged = False
        except CapacityError:
            self._damaged = False
            raise
        finally:
            self._lock.release()


def _checked(ids: npt.ArrayLike, vocab_size: int) -> Ids:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError("ids must be a list of whole numbers")
    ids_N = array.astype(np.int64)
    if len(ids_N) and (ids_N.min() < 0 or ids_N.max() >= vocab_size):
        raise InputError(f"ids must lie in 0..{vocab_size - 1}")
    return ids_N


def _checked_closes(lengths: npt.ArrayLike, n_ids: int) -> npt.NDArray[Any]:
    lengths_P = np.trim_zeros(np.asarray(lengths).reshape(-1), "b")  # the reference pads with zeros
    if lengths_P.size == 0 or lengths_P.dtype.kind not in "iu" or lengths_P.min() < 1:
        raise InputError("patch lengths must be whole numbers of at least 1")
    if lengths_P.sum() != n_ids + 1 or lengths_P[0] != 1:
        raise InputError(f"patch lengths must begin with 1 and sum to {n_ids + 1} (the ids and one next token)")
    return closes_from_lengths(lengths_P)

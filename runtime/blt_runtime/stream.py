"""One text with its state: reads bytes, one by one or many at once, and predicts the next byte.

The entropy model, the encoder and the decoder run once per byte, the latent transformer once per complete patch. The
open patch is never computed, because no graph reads it (spec section 5). All calls of a step are bound beforehand, so
a step allocates nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import numpy as np
import numpy.typing as npt

from .arguments import choice, flag, instance, whole
from .backends.protocol import Array, Backend
from .bundle.open_files import OpenFiles
from .bundle.spec import ModelSpec
from .engine.memory import Memory, out_of_memory
from .engine.prefill import Cancel, Prefill
from .engine.snapshot import Snapshot, put, take
from .engine.step import StepCalls
from .errors import Cancelled, CapacityError, ConfigError, InputError, UsageError, shown
from .grammar import GrammarSampler
from .hashing import HashTables, by_graph, check_tables
from .ids import BOS, BYTES, EOS, OFFSET, Ids, checked_ids, encode
from .options import GenerateKeywords, GenerateOptions, resolve
from .patching import checked_closes, closes_from_lengths
from .patching import patch_lengths as rule_lengths
from .sampling import Sampler, generator
from .speculation.speculate import Speculation, SpeculationStats, Speculator
from .text import StopMatcher

Overflow = Literal["error", "slide"]
CHECK_EVERY = 16
"""Generated tokens after which the files of the bundle are checked again."""


@dataclass(frozen=True)
class Score:
    """The results of a model over ids [N].

    entropies: [N] in nats, NaN without an entropy model. patch_lengths: [P] with the sum N + 1, since the last patch
    holds one virtual token. logits: [N, V] float32; row t predicts id t + 1.

    Example:
        score = model.score(encode("Once upon a time"))  # blt_runtime.ids.encode
        print(score.patch_lengths, score.entropies.mean())
    """

    ids: Ids
    entropies: Array
    patch_lengths: Ids
    logits: Array


class Stream:
    """Owns all state of one text. Made by `Model.stream`. Streams share a model; one thread at a time uses a stream.

    bos: begin with BOS, also after `reset`. seed: of the generator that draws when a call sets no seed.

    overflow: what happens when the next token does not fit. "error" raises CapacityError and leaves the stream as it
    was. "slide" forgets the oldest text and continues: the stream is reset (to BOS if `bos`) and reads the newest half
    of the text, the new token included, in one prefill. Of a text longer than the stream, it reads the newest half of
    the capacity. The half begins with a whole UTF-8 character (so up to 3 bytes less), and is halved again while its
    patches do not fit. So a slide reads again at most as many tokens as it forgets: one per token appended.
    `forgotten` counts them. No call brings them back.

    files: of the bundle that the model was opened from. They are checked when a method is called and every CHECK_EVERY
    generated tokens; BundleError is raised, with nothing changed, if one has changed.

    Example:
        stream = model.stream(seed=1)
        stream.append("Once upon a time")
        for piece in stream.generate(200):
            sys.stdout.buffer.write(piece)
        stream.rewind(50)  # and continue differently

    Raises OutOfMemory (nothing is kept).
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        hash_tables: HashTables | None = None,
        *,
        bos: bool = True,
        seed: int | None = None,
        overflow: Overflow = "error",
        files: OpenFiles | None = None,
    ) -> None:
        check_model(spec, backend, hash_tables)
        self.spec = spec
        if files is not None:
            instance("files", files, OpenFiles, "an OpenFiles (blt_runtime.bundle.open_files)")
        self._owner = backend
        self._files = files
        self._bos = flag("bos", bos)
        self._slides = _slides(overflow, spec, bos)
        self._random = generator(seed)
        try:
            self._memory = Memory(spec, backend, hash_tables)
            self._calls = StepCalls(self._memory)
        except MemoryError as error:
            raise out_of_memory(spec, error) from error
        self._step = self._calls.read
        self._prefill = Prefill(self._memory)
        self._speculator = Speculator(self._memory, self._calls)
        self._uses = 0
        self._forgotten = 0
        self._began: weakref.WeakKeyDictionary[Sampler, int] = weakref.WeakKeyDictionary()
        self._with_entropy = spec.patch_rule.needs_entropy
        self._lock = threading.Lock()
        self._damaged = False
        self.reset()

    @property
    def position(self) -> int:
        """Tokens held, BOS included: all that were read, less those `forgotten`."""
        return self._memory.position

    @property
    def forgotten(self) -> int:
        """The oldest tokens of the text that a stream with overflow "slide" no longer holds."""
        return self._forgotten

    @property
    def ids(self) -> Ids:
        """The tokens held [N] (a copy)."""
        return self._memory.ids_N.copy()

    @property
    def logits(self) -> Array:
        """Next-byte logits [V] float32: a view that the next token overwrites. Raises UsageError if the stream is
        empty."""
        if self.position == 0:
            raise UsageError("the stream is empty: append something first, or open it with bos=True")
        return self._calls.logits_V

    @property
    def speculation(self) -> SpeculationStats:
        """Counts of speculative decoding on this stream so far."""
        return self._speculator.stats

    @property
    def patch_lengths(self) -> Ids:
        """Patch lengths [P]; they sum to position + 1, the last patch holds one virtual next token."""
        memory = self._memory
        return np.diff([*memory.starts_P[: memory.patches + 1], memory.position + 1]).astype(np.int64)

    def append(self, text: str | bytes, cancelled: Cancel | None = None) -> None:
        """Appends text or bytes, all or nothing: see `append_ids`."""
        self.append_ids(encode(text, bos=False), cancelled)

    def append_ids(self, ids: npt.ArrayLike, cancelled: Cancel | None = None) -> None:
        """Appends ids [N], all or nothing.

        cancelled: called before every chunk; for example the `is_set` of an event that another thread sets. Once it
        returns True, the stream is rolled back to what it was, and Cancelled is raised.

        Raises InputError for ids outside the vocabulary, and CapacityError (nothing changed) if they do not fit and the
        stream does not slide.
        """
        ids_N = checked_ids(ids, self.spec.vocab_size)
        if cancelled is not None and not callable(cancelled):
            raise UsageError(f"cancelled must be a function without arguments, not {shown(cancelled)}")
        with self._exclusive():
            self._append(ids_N, cancelled)

    def reset(self) -> None:
        """Forgets everything and begins again, with BOS if the stream was opened with it."""
        with self._exclusive(repair=True):
            self._start()
            self._began.clear()

    def rewind(self, n_tokens: int) -> None:
        """Removes the last `n_tokens` of the tokens held; the state is exactly that of a stream that never read them.

        It replays the tokens from the last boundary on if the caches still reach back there, and else all tokens. A
        sampler with a grammar that continues afterwards continues from what is left of its text; if the rewind went
        further back than its beginning, it begins again.

        Raises UsageError (nothing changed) for more tokens than the stream holds.
        """
        n_tokens = whole("n_tokens", n_tokens, wanted="a whole number of tokens from 0 up")
        if n_tokens > self.position:
            gone = f" (the {self._forgotten} before them are forgotten)" if self._forgotten else ""
            raise UsageError(f"cannot rewind {shown(n_tokens)} of {self.position} tokens{gone}")
        with self._exclusive():
            if n_tokens:
                self._return_to(self.position - n_tokens)
                end = self.position + self._forgotten
                for sampler in [sampler for sampler, began in self._began.items() if end < began]:
                    del self._began[sampler]

    def snapshot(self) -> Snapshot:
        """A copy of the state. `restore` puts it into this or another stream of the same model without reading the text
        again."""
        with self._exclusive(changes=False):
            return take(self._memory, self._owner, self._calls.logits_V, self._forgotten)

    def restore(self, snapshot: Snapshot) -> None:
        """Sets the state to that of `snapshot`, to the last bit. A sampler with a grammar that continues afterwards
        begins its text again.

        Raises UsageError (nothing changed) for a snapshot of another model.
        """
        instance("snapshot", snapshot, Snapshot, "what Stream.snapshot returned")
        if not snapshot.is_of(self.spec, self._owner):
            raise UsageError("this snapshot was taken from a stream of another model: take one from this model's")
        with self._exclusive(repair=True):
            put(snapshot, self._memory, self._calls.logits_V)
            self._forgotten = snapshot.forgotten
            self._began.clear()
            self._calls.read_patches()

    def generate(
        self,
        n: int,
        *,
        sampler: Sampler | None = None,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Iterator[bytes]:
        """Generates up to `n` tokens and yields the bytes of each: b"" for a special id, or while bytes are held back
        because they may begin a stop string. The stream has read every token before its bytes come out, also those of
        a stop string; it does not read an EOS that ends the text.

        sampler: chooses the ids in place of temperature, top_k, top_p, min_p, seed and grammar. options, keywords: see
        `GenerateOptions`; a keyword replaces a field of `options`. With a grammar, bytes that it forces are drafted,
        unless `speculate` says otherwise.

        Raises UsageError for a bad option, an empty stream or a drafter that the model cannot use, and CapacityError
        when the stream is full and does not slide.

            for piece in stream.generate(200, temperature=0.7, stop="\n"):
                sys.stdout.buffer.write(piece)
        """
        chosen = resolve(options, keywords, sampler)
        ids = self._start_generating(n, chosen, sampler or chosen.sampler(self._random))
        return self._generate_bytes(ids, StopMatcher(chosen.stop))

    def generate_ids(
        self,
        n: int,
        *,
        sampler: Sampler | None = None,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Iterator[int]:
        """Generates up to `n` ids. The stream has read each when it is yielded.

        sampler, options, keywords: as for `generate`, but for `stop`, which applies to bytes.

        Raises UsageError and CapacityError as `generate` does.
        """
        chosen = resolve(options, keywords, sampler)
        if chosen.stop is not None:
            raise UsageError("stop applies to bytes, not to ids: use generate")
        return self._start_generating(n, chosen, sampler or chosen.sampler(self._random))

    def _start_generating(self, n: int, options: GenerateOptions, sampler: Sampler) -> Iterator[int]:
        n = whole("n", n, wanted="a whole number that is not negative")
        _ = self.logits
        speculation, speculate = None, options.speculate
        if speculate == "off" and isinstance(sampler, GrammarSampler):
            speculate = sampler.drafter()
        if speculate != "off":
            with self._exclusive(changes=False):
                speculation = self._speculator.start(speculate, options.draft, sampler)
        return self._generate_ids(n, sampler, options.stop_at_eos, speculation)

    def score_ids(self, ids: npt.ArrayLike, patch_lengths: npt.ArrayLike | None = None) -> Score:
        """Runs ids [N] through the emptied stream, without adding BOS, and returns all results. The stream is reset
        afterwards.

        patch_lengths: [P] in place of the patch rule's, the first 1, the sum N + 1.

        Raises InputError for bad ids or patch lengths, and CapacityError if the ids do not fit (nothing changed) or
        need too many patches (the stream is reset).
        """
        ids_N = checked_ids(ids, self.spec.vocab_size)
        if not len(ids_N):
            raise InputError("there is nothing to score: no ids")
        closes_N = None if patch_lengths is None else checked_closes(patch_lengths, len(ids_N))
        if closes_N is None and self.spec.patch_rule.scheme == "bpe":  # a delimiter at the end closes no patch
            closes_N = closes_from_lengths(rule_lengths(self.spec.patch_rule, ids_N))
        if len(ids_N) > self.spec.capacity_bytes:
            raise CapacityError(
                f"{len(ids_N):,} ids exceed the capacity of {self.spec.capacity_bytes:,}: "
                "give a shorter text, or export with a larger --capacity"
            )
        with self._exclusive(repair=True):
            logits_NV = np.empty((len(ids_N), self.spec.vocab_size), dtype=np.float32)
            self._memory.clear()
            try:
                with_entropy = "entropy" in self.spec.graphs
                self._prefill.run(ids_N, with_entropy=with_entropy, closes_N=closes_N, logits_NV=logits_NV)
                entropies_N = self._memory.entropies.array[0, : len(ids_N)].copy()
                return Score(ids_N, entropies_N, patch_lengths=self.patch_lengths, logits=logits_NV)
            finally:
                self._start()
                self._began.clear()

    def _start(self) -> None:
        self._clear()
        if self._bos:
            self._step(BOS)

    def _clear(self) -> None:
        self._memory.clear()
        self._forgotten = 0
        self._calls.read_patches()

    def _generate_ids(
        self, n: int, sampler: Sampler, stop_at_eos: bool, speculation: Speculation | None
    ) -> Iterator[int]:
        uses = -1
        for done in range(n):
            with self._exclusive(check=done % CHECK_EVERY == 0):
                if self._uses != uses + 1:  # another call has used the stream since
                    self._follow(sampler)
                    if speculation is not None:
                        speculation.drop()
                uses = self._uses
                id = sampler(self._calls.logits_V) if speculation is None else speculation.choose()
                if stop_at_eos and id == EOS:
                    return
                self._read_generated(id, speculation)
            yield id

    def _follow(self, sampler: Sampler) -> None:
        """Tells a sampler that begins or continues what its text is now."""
        began = self._began.setdefault(sampler, self.position + self._forgotten)
        first = int(self._bos and self._forgotten > 0)  # a BOS that a slide has put there
        at = began - self._forgotten
        sampler.follow(self._memory.ids_N[max(at, first) :], max(0, first - at))

    def _generate_bytes(self, ids: Iterator[int], matcher: StopMatcher) -> Iterator[bytes]:
        for id in ids:
            yield matcher.feed(BYTES[id])
            if matcher.stopped:
                return
        if rest := matcher.flush():
            yield rest

    def _read_generated(self, id: int, speculation: Speculation | None) -> None:
        """Reads a generated token."""
        try:
            if speculation is None:
                self._step(id)
            else:
                speculation.read(id)
        except CapacityError:
            if not self._slides:
                raise
            self._slide(np.array([id]))
            if speculation is not None:
                speculation.drop()

    def _append(self, ids_N: Ids, cancelled: Cancel | None) -> None:
        """Reads ids [N], all or nothing."""
        before, end = self._memory.position, self._memory.position + len(ids_N)
        try:
            self._memory.check_room(len(ids_N))
            self._read(ids_N, cancelled)
        except CapacityError:
            if not self._slides:
                raise
            self._slide(ids_N, cancelled)
        except Cancelled:
            self._return_to(before, end)
            raise

    def _read(self, ids_N: Ids, cancelled: Cancel | None = None) -> None:
        """Reads ids [N] for which there is room. Raises CapacityError or Cancelled as `Prefill.run` does."""
        if len(ids_N) == 1:
            if cancelled is not None and cancelled():
                raise Cancelled("the text was not read: its caller cancelled it")
            return self._step(int(ids_N[0]))
        if len(ids_N):
            self._read_all(ids_N, cancelled)
        return None

    def _read_all(self, ids_N: Ids, cancelled: Cancel | None = None, closes_N: Array | None = None) -> None:
        """Reads ids [N] in chunks. closes_N: where patches end, in place of the patch rule's."""
        run = self._prefill.run
        self._calls.logits_V[:] = run(ids_N, with_entropy=self._with_entropy, closes_N=closes_N, cancelled=cancelled)
        self._calls.read_patches()

    def _slide(self, ids_N: Ids, cancelled: Cancel | None = None) -> None:
        """Begins again with the newest half of the text that ids [N] would overflow, those ids included."""
        held_N, forgotten = self._memory.ids_N.copy(), self._forgotten
        closes_N = closes_from_lengths(self.patch_lengths)
        begun = int(self._bos and held_N[:1].tolist() == [BOS])
        text_N = np.concatenate([held_N[begun:], ids_N])
        total = forgotten + len(text_N)
        fits = False
        while not fits:
            text_N = _newest_half(text_N, self.spec.capacity_bytes - self._bos)
            self._start()
            try:
                self._read(text_N, cancelled)
                fits = True
            except CapacityError:  # too many patches
                continue
            except Cancelled:
                self._clear()
                self._read_all(held_N, closes_N=closes_N)
                self._forgotten = forgotten
                raise
        self._forgotten = total - len(text_N)

    def _return_to(self, tokens: int, entropy_end: int | None = None) -> None:
        """Restores the state after the first `tokens` tokens."""
        memory = self._memory
        ids_N, closes_N = memory.ids_N[:tokens].copy(), closes_from_lengths(self.patch_lengths)[:tokens]
        if not memory.roll_back(tokens, entropy_end) or tokens == 0:
            memory.clear()
        self._calls.read_patches()
        start = memory.position
        try:
            self._read(ids_N[start:])
        except CapacityError:  # an entropy next to the threshold, computed in another call, closes one patch more
            self._read_all(ids_N[start:], closes_N=closes_N[start:])

    @contextmanager
    def _exclusive(self, repair: bool = False, changes: bool = True, check: bool = True) -> Iterator[None]:
        """Admits one thread at a time. A call that failed half-way leaves a stream that refuses everything but `reset`
        and `restore`. check: raise BundleError, with nothing changed, if a file of the bundle has changed."""
        if not self._lock.acquire(blocking=False):
            raise UsageError("another thread is using this stream: give each thread its own")
        try:
            if self._damaged and not repair:
                raise UsageError("an earlier call on this stream failed half-way: call reset() first")
            if check and self._files is not None:
                self._files.check()
            self._damaged = changes
            self._uses += 1
            yield
            self._damaged = False
        except (CapacityError, Cancelled):
            self._damaged = False
            raise
        except MemoryError as error:
            raise out_of_memory(self.spec, error) from error
        finally:
            self._lock.release()


def check_model(spec: ModelSpec, backend: Backend, hash_tables: HashTables | None) -> None:
    """Raises UsageError unless these are a spec and a backend, and ConfigError unless the hash tables fit the spec."""
    instance("spec", spec, ModelSpec, "a ModelSpec (Model.open reads a bundle's)")
    if not callable(getattr(backend, "session", None)) or not callable(getattr(backend, "buffer", None)):
        raise UsageError(f"backend must be a Backend (blt_runtime.backends.protocol), not {shown(backend)}")
    given, hashes = by_graph(hash_tables), spec.hashes
    if set(given) != set(hashes):
        raise ConfigError("hash tables must be given exactly when the spec has a hash, by the names of its graphs")
    for name, hash in hashes.items():
        check_tables(given[name], hash.tables, hash.rows, hash.dim, hash.dtype)


def _slides(overflow: Overflow, spec: ModelSpec, bos: bool) -> bool:
    choice("overflow", overflow, get_args(Overflow))
    if overflow == "slide" and min(spec.capacity_bytes, spec.capacity_patches) < 1 + bos:
        raise UsageError("the capacity is too small to slide in: export with a larger --capacity")
    return overflow == "slide"


def _newest_half(ids_N: Ids, room: int) -> Ids:
    """The newest half of ids [N], or of `room` if there are more ids. It leaves out the tail of a UTF-8 character that
    begins before it."""
    start = len(ids_N) - max(1, min(len(ids_N), room) // 2)
    bytes_N = ids_N[start : start + 4] - OFFSET
    whole_N = np.flatnonzero((bytes_N < 0x80) | (bytes_N > 0xBF))
    return ids_N[start + (int(whole_N[0]) if len(whole_N) else 0) :]

"""A model that is ready to run: shared and read-only. Streams made from it own everything that changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

import numpy.typing as npt

from .backends.protocol import Backend
from .bundle.bundle import Bundle, Verify
from .bundle.manifest import Manifest, check_precision
from .bundle.spec import ModelSpec
from .errors import ConfigError, OutOfMemory, UsageError
from .hashing import Tables, check_tables
from .options import GenerateKeywords, GenerateOptions, resolve
from .sampling import is_whole
from .stream import Overflow, Score, Stream
from .text import Utf8Stream


class Model:
    """A spec, a backend that runs its graphs, and its hash tables in the spec's type: one array [T * rows, D_l]
    or T arrays [rows, D_l] (None if the model has none).

    Threads may share a model as long as each uses streams of its own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        hash_tables: Tables | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.manifest = manifest
        self._hash_tables = hash_tables
        if (spec.hash is None) != (hash_tables is None):
            raise ConfigError("hash tables must be given exactly when the spec has a hash")
        if spec.hash is not None and hash_tables is not None:
            check_tables(hash_tables, spec.hash.tables, spec.hash.rows, spec.hash.dim, spec.hash.dtype)

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "onnx",
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        verify: Verify = "auto",
        precision: str | None = None,
        many: bool = False,
        prepack: bool | None = None,
    ) -> Model:
        """Opens the bundle folder `path`.

        backend: "onnx" (ONNX Runtime) or "null" (does nothing, for tests). threads: of one call, None lets
        the backend choose. providers: ONNX Runtime execution providers, CPU by default; one that does not
        load is an error. verify: see `Bundle.open`. precision: what the bundle must have been exported at
        ("fp32", "int8", "int4"); None takes any. many: open the graphs for many streams, for a `Scheduler`; such a
        model has no streams of its own. prepack: see `OnnxBackend`; True is worth it for float32 beyond 4 GB where
        calls take several tokens (`speculate`). Raises UsageError, BundleError, BackendError, OutOfMemory
        or MissingExtra.
        """
        if threads is not None and not (is_whole(threads) and threads >= 1):
            raise UsageError("threads must be a whole number of at least 1")
        try:
            bundle = Bundle.open(path, verify)
            if precision is not None:
                check_precision(bundle.manifest, precision, str(path))
            chosen, spec = _backend(backend, bundle, threads, providers, many, prepack), bundle.manifest.spec
            return cls(spec, chosen, bundle.hash_tables(), bundle.manifest)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "start new thread" not in str(error):  # its stack finds no room
                raise
            reason = f"not enough memory to open {path} ({error})"
            raise OutOfMemory(f"{reason}: export at fewer bits, or free some") from error

    @property
    def hash_tables(self) -> Tables | None:
        """As stored; None if the model has none."""
        return self._hash_tables

    def stream(self, bos: bool = True, seed: int | None = None, overflow: Overflow = "error") -> Stream:
        """A new stream: caches for the bundle's capacity, nothing read yet but BOS. overflow "slide" lets it forget its
        oldest text when it is full (see `Stream`). Raises OutOfMemory."""
        return Stream(self.spec, self.backend, self._hash_tables, bos=bos, seed=seed, overflow=overflow)

    def score(self, ids: npt.ArrayLike, patch_lengths: npt.ArrayLike | None = None) -> Score:
        """`Stream.score_ids` on a stream of its own."""
        return self.stream(bos=False).score_ids(ids, patch_lengths)

    def generate_text(
        self,
        prompt: str | bytes,
        n: int,
        *,
        overflow: Overflow = "error",
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Iterator[str]:
        """Text that continues `prompt`, up to `n` bytes, yielded as whole characters (invalid bytes become U+FFFD).

        overflow: see `Stream`. options, keywords: see `GenerateOptions`; a keyword replaces a field of `options`.

        Raises UsageError for a bad option, OutOfMemory, and CapacityError when the text does not fit and the stream
        does not slide.
        """
        chosen = resolve(options, keywords)
        stream = self.stream(overflow=overflow)
        stream.append(prompt)
        return _as_text(stream.generate(n, options=chosen))


def _as_text(pieces: Iterator[bytes]) -> Iterator[str]:
    text = Utf8Stream()
    for piece in pieces:
        if complete := text.feed(piece):
            yield complete
    if rest := text.flush():
        yield rest


def _backend(
    name: str,
    bundle: Bundle,
    threads: int | None,
    providers: Sequence[str] | None,
    many: bool,
    prepack: bool | None,
) -> Backend:
    if name == "onnx":
        from .backends.onnx import OnnxBackend, OnnxRowBackend

        return (OnnxRowBackend if many else OnnxBackend)(bundle, threads, providers, prepack=prepack)
    if name == "null":
        from .backends.null import NullBackend

        return NullBackend(bundle.manifest.spec)
    raise UsageError(f"backend {name!r} is unknown; known: onnx, null")

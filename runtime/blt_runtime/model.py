"""A model that is ready to run: shared and read-only. Its streams own all state that changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy.typing as npt

from .arguments import choice, flag, instance, whole
from .backends.protocol import Backend
from .backends.providers import NAMES, TABLE_PLACES, check_engine_cache
from .bundle.bundle import Bundle, Verify
from .bundle.engines import Engines, is_engines
from .bundle.manifest import PRECISIONS, Manifest, check_precision
from .bundle.open_files import OpenFiles
from .bundle.spec import ModelSpec
from .engine.batch import with_padding
from .errors import OutOfMemory, UsageError, shown
from .hashing import HashTables, Tables, by_graph
from .options import GenerateKeywords, GenerateOptions, resolve
from .stream import Overflow, Score, Stream, check_model
from .text import Utf8Stream

if TYPE_CHECKING:
    from .backends.null import NullBackend
    from .backends.onnx import OnnxBackend

MOST_THREADS = 1024


class Model:
    """A spec, a backend that runs its graphs, and its hash tables.

    hash_tables: by graph ("encoder", "entropy"), in the spec's dtype, one array [T * rows, D_l] or T arrays
    [rows, D_l]; those of the encoder alone may be given without a name. None if the model has none.
    files: of the bundle, checked before use (see `Stream`). Threads may share a model if each uses its own streams.

    Example:
        model = Model.open("bundle")
        for text in model.generate_text("Once upon a time", 200):
            print(text, end="", flush=True)

    Raises ConfigError if the hash tables do not fit the spec.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        hash_tables: HashTables | None = None,
        *,
        manifest: Manifest | None = None,
        files: OpenFiles | None = None,
    ) -> None:
        check_model(spec, backend, hash_tables)
        if files is not None:
            instance("files", files, OpenFiles, "an OpenFiles (blt_runtime.bundle.open_files)")
        self.spec = spec
        self.backend = backend
        self.manifest = manifest
        self.files = files
        self._hash_tables = by_graph(hash_tables)

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "onnx",
        *,
        threads: int | None = None,
        provider: str = "cpu",
        verify: Verify = "auto",
        precision: str | None = None,
        batched: bool = False,
        prepack: bool | None = None,
        hash_tables: str = "auto",
        trust_engines: bool = False,
        engine_cache: str | Path | None = None,
        many: bool | None = None,
    ) -> Model:
        """Opens the bundle folder `path`, or a folder of TensorRT engines (`blt build`) on this machine's first GPU.

        backend: "onnx" (ONNX Runtime) or "null" (does nothing, for tests). threads: for one call; None lets the backend
        choose. provider: ONNX Runtime's, "cpu", "cuda", "tensorrt", "webgpu", or "auto" (see `OnnxBackend`); "cuda" and
        "webgpu" run bundles of the flavour cuda, "tensorrt" those of the flavour portable. verify: see `Bundle.open`.
        precision: the one that the bundle must have been exported at ("fp32", "fp16", "bf16", "int8", "int4"); None
        accepts any. batched: open the batched graphs, for a `Scheduler`; such a model has no single streams. Engines
        have them after `blt build --profiles step,prefill,rows=N`. prepack: see `OnnxBackend`; True pays for float32
        models over 4 GB whose calls hold several tokens (`speculate`). hash_tables: of a batched model, where hash
        embeddings are computed, "host", "device" or "auto" (`OnnxRowBackend`). trust_engines: accept engines that this
        user has not built. engine_cache: the folder where the provider "tensorrt" keeps its engines (`OnnxBackend`); no
        other provider has one, but "auto", which may choose it. many: the former name of `batched`, which warns.

        Raises UsageError, BundleError, BackendError, OutOfMemory or MissingExtra.
        """
        if many is not None:
            warnings.warn("Model.open(many=...) is now batched=...", DeprecationWarning, stacklevel=2)
            batched = many
        _check_open(backend, threads, provider, precision, batched, prepack)
        flag("trust_engines", trust_engines)
        choice("hash_tables", hash_tables, TABLE_PLACES)
        check_engine_cache(engine_cache, provider)
        if engine_cache is not None and (batched or backend == "null" or is_engines(path)):
            raise UsageError("engine_cache is for single streams of a bundle on ONNX Runtime: leave it out")
        try:
            if is_engines(path):
                _check_for_engines(path, backend, provider, prepack, hash_tables)
                return cls._open_engines(Engines.open(path, trust=trust_engines, verify=verify), precision, batched)
            bundle = Bundle.open(path, verify)
            if precision is not None:
                check_precision(bundle.manifest, precision, str(path))
            files = OpenFiles(bundle)
            place = hash_tables if batched else "host"
            made = _backend(
                backend,
                bundle,
                threads=threads,
                provider=provider,
                batched=batched,
                prepack=prepack,
                hash_tables=place,
                engine_cache=engine_cache,
            )
            tables = bundle.hash_tables()
            files.check_names()
            return cls(made.spec, made, tables, manifest=bundle.manifest, files=files)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "start new thread" not in str(error):  # no memory for its stack
                raise
            reason = f"not enough memory to open {path} ({error})"
            raise OutOfMemory(f"{reason}: export at fewer bits, or free some") from error

    @classmethod
    def _open_engines(cls, engines: Engines, precision: str | None, batched: bool) -> Model:
        from .backends import platform

        manifest = engines.manifest
        if batched:
            engines.check_rows()
        if precision is not None:
            check_precision(manifest, precision, str(engines.path))
        files = OpenFiles(engines.bundle, [ref.file for ref in manifest.tables.values()])
        made = platform.open_engines(engines, platform.open_platform(), batched=batched)
        tables = engines.bundle.hash_tables()
        files.check_names()
        spec = with_padding(made.spec) if batched else made.spec
        return cls(spec, made, tables, manifest=manifest, files=files)

    @property
    def hash_tables(self) -> Mapping[str, Tables]:
        """The hash tables by graph, as stored in the bundle; empty if the model has none."""
        return self._hash_tables

    def stream(self, bos: bool = True, seed: int | None = None, overflow: Overflow = "error") -> Stream:
        """A new stream with caches for the bundle's capacity. It has read BOS, or nothing if bos is False.

        seed: of the stream's generator. overflow: "slide" forgets the oldest text when the stream is full (see
        `Stream`). Raises UsageError for bad arguments, and OutOfMemory.
        """
        return Stream(
            self.spec, self.backend, self._hash_tables, bos=bos, seed=seed, overflow=overflow, files=self.files
        )

    def score(self, ids: npt.ArrayLike, patch_lengths: npt.ArrayLike | None = None) -> Score:
        """`Stream.score_ids` on a new stream."""
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


def _check_open(
    backend: str,
    threads: int | None,
    provider: str,
    precision: str | None,
    batched: bool,
    prepack: bool | None,
) -> None:
    """Raises UsageError for a wrong type or value."""
    if not isinstance(backend, str) or backend not in ("onnx", "null"):
        raise UsageError(f"backend {shown(backend)} is unknown; known: onnx, null")
    if threads is not None:
        whole("threads", threads, 1, MOST_THREADS)
    choice("provider", provider, NAMES)
    if precision is not None:
        choice("precision", precision, PRECISIONS)
    flag("batched", batched)
    if prepack is not None:
        flag("prepack", prepack)


def _check_for_engines(path: str | Path, backend: str, provider: str, prepack: bool | None, hash_tables: str) -> None:
    """Raises UsageError for an option that engines do not have."""
    if hash_tables == "device":
        raise UsageError(f"{path} holds TensorRT engines, whose hash tables are on the host: leave out hash_tables")
    if backend != "onnx" or prepack is not None:
        raise UsageError(f"{path} holds TensorRT engines: leave out the backend and prepack")
    if provider not in ("cpu", "auto"):
        raise UsageError(f"{path} holds TensorRT engines, which are no provider of ONNX Runtime: leave out {provider}")


def _backend(
    name: str,
    bundle: Bundle,
    *,
    threads: int | None,
    provider: str,
    batched: bool,
    prepack: bool | None,
    hash_tables: str,
    engine_cache: str | Path | None,
) -> OnnxBackend | NullBackend:
    if name == "onnx":
        from .backends.onnx import OnnxBackend, OnnxRowBackend

        if batched:
            return OnnxRowBackend(bundle, threads, provider, prepack=prepack, hash_tables=hash_tables)
        return OnnxBackend(bundle, threads, provider, prepack=prepack, engine_cache=engine_cache)
    from .backends.null import NullBackend

    return NullBackend(bundle.manifest.spec)

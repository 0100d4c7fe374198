"""Reads the documents of files, one after another or several files at once, in the order of the files.

A text file holds documents separated by NUL bytes, a JSONL file (also `.json`) one document per line, a parquet file
one per row.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue
from typing import BinaryIO

from blt.data.compressed import open_bytes
from blt.data.inputs import Source
from blt.data.parquet import read_parquet
from blt.data.records import Document, Growing, Reading, read_jsonl

READ_BYTES = 1 << 22
QUEUED_BYTES, QUEUED_DOCUMENTS = 1 << 22, 10_000
"""Documents that a thread hands over at once."""
Part = list[Document] | BaseException | None


def read_documents(source: Source, reading: Reading | None = None) -> Iterator[Document]:
    """The documents of one file without empty ones."""
    reading = reading or Reading()
    found = read_parquet(source.path, reading) if source.format == "parquet" else _lines_or_text(source, reading)
    yield from (document for document in found if document.size)


def _lines_or_text(source: Source, reading: Reading) -> Iterator[Document]:
    with open_bytes(source.path, source.compression, reading.max_memory) as file:
        yield from read_jsonl(file, source.path, reading) if source.format == "jsonl" else _text(file, reading)


def read_all(
    sources: Iterable[Source], reading: Reading | None = None, workers: int = 1
) -> Iterator[tuple[Source, Document]]:
    """(source, document) of all sources, in the same order for any number of `workers`.

    Workers are threads, because decompression and hashing release the interpreter lock. Each reads a few MB ahead.
    """
    reading = reading or Reading()
    if workers > 1:
        yield from _read_in_threads(sources, reading, workers)
        return
    for source in sources:
        for document in read_documents(source, reading):
            yield source, document


def _read_in_threads(sources: Iterable[Source], reading: Reading, workers: int) -> Iterator[tuple[Source, Document]]:
    stop = threading.Event()
    pending: deque[tuple[Source, Queue[Part]]] = deque()
    todo = iter(sources)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(pending) < workers and (source := next(todo, None)) is not None:
                    queue: Queue[Part] = Queue(2)
                    pool.submit(_produce, source, reading, queue, stop)
                    pending.append((source, queue))
                if not pending:
                    return
                source, queue = pending.popleft()
                while (part := queue.get()) is not None:
                    if isinstance(part, BaseException):
                        raise part
                    for document in part:
                        yield source, document
        finally:
            stop.set()  # also if the caller reads no further


def _produce(source: Source, reading: Reading, queue: Queue[Part], stop: threading.Event) -> None:
    """Puts the documents of a source into `queue`, then None, or the error that ended it."""
    try:
        part: list[Document] = []
        size = 0
        for document in read_documents(source, reading):
            part.append(document)
            size += document.size
            if size >= QUEUED_BYTES or len(part) >= QUEUED_DOCUMENTS:
                _put(part, queue, stop)
                part, size = [], 0
                if stop.is_set():
                    return
        _put(part, queue, stop)
        _put(None, queue, stop)
    except BaseException as error:
        _put(error, queue, stop)


def _put(part: Part, queue: Queue[Part], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            queue.put(part, timeout=0.1)
        except Full:
            continue
        return


def _text(file: BinaryIO, reading: Reading) -> Iterator[Document]:
    """Documents between NUL bytes; a file without NUL is one document."""
    rest = Growing(reading.spill)
    while block := file.read(READ_BYTES):
        first, *others = block.split(b"\0")
        rest.append(first)
        if others:
            yield rest.finish()
            yield from map(Document, others[:-1])
            rest.append(others[-1])
    yield rest.finish()

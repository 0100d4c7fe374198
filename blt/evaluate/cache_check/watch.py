"""What a stream computes, seen from the backend: every entropy and every vector of logits, of single steps and chunks.

A `Watcher` is a backend around another one. It copies what the entropy graph and the decoder wrote, with the positions
they wrote it for, into the `Taken` that is in place at that moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from blt_runtime import Model
from blt_runtime.backends.protocol import Backend, Buffer, Call, Session
from blt_runtime.bundle.spec import GraphSpec
from blt_runtime.ids import Ids

WATCHED = {"entropy": "entropy", "decoder": "logits"}
"""Graph and its output."""
Array = npt.NDArray[Any]


@dataclass
class Taken:
    """Outputs in the order of computing: positions [S] with entropies [S], and positions [S] with logits [S, V]."""

    entropy: list[tuple[Ids, Array]] = field(default_factory=list)
    logits: list[tuple[Ids, Array]] = field(default_factory=list)

    def since(self, start: tuple[int, int]) -> Taken:
        return Taken(self.entropy[start[0] :], self.logits[start[1] :])

    @property
    def end(self) -> tuple[int, int]:
        return len(self.entropy), len(self.logits)


def joined(pieces: list[tuple[Ids, Array]]) -> tuple[Ids, Array]:
    """All positions and all values."""
    return np.concatenate([at for at, _ in pieces]), np.concatenate([values for _, values in pieces])


class Watcher:
    """A backend that shows its outputs to `sink` (None: nobody looks)."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self.sink: Taken | None = None
        self._backend = backend

    def session(self, group: str) -> Session:
        session = self._backend.session(group)
        return WatchedSession(session, self, WATCHED[group]) if group in WATCHED else session

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self._backend.buffer(dtype, shape)

    @contextmanager
    def into(self, taken: Taken | None) -> Iterator[None]:
        self.sink = taken
        try:
            yield
        finally:
            self.sink = None


class WatchedSession:
    """One graph, one of whose outputs is copied after each call."""

    def __init__(self, session: Session, watcher: Watcher, output: str) -> None:
        self._session, self._watcher, self._output = session, watcher, output

    @property
    def spec(self) -> GraphSpec:
        return self._session.spec

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        run, watcher, output = self._session.bind(buffers), self._watcher, self._output
        positions_S, values_S = buffers["positions"].array[0], buffers[output].array[0]

        def call() -> None:
            run()
            if watcher.sink is not None:
                getattr(watcher.sink, output).append((positions_S.copy(), values_S.copy()))

        return call


def watched(model: Model) -> tuple[Model, Watcher]:
    """The model behind a watcher; what `model` itself gives out stays as it is."""
    watcher, other = Watcher(model.backend), copy.copy(model)
    other.backend = watcher
    return other, watcher

"""Records what a stream computes at the backend: every entropy and vector of logits, of single steps and chunks.

A `Recorder` is a backend around another one. It copies the outputs of the entropy graph and the decoder, with their
positions, into the current `Recording`.
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
from blt_runtime.backends.protocol import Backend, Buffer, Call, Place, Session
from blt_runtime.bundle.spec import GraphSpec
from blt_runtime.ids import Ids

RECORDED = {"entropy": "entropy", "decoder": "logits"}
"""Graph and its output."""
Array = npt.NDArray[Any]


@dataclass
class Recording:
    """Outputs in the order of computation: positions [S] with entropies [S], and positions [S] with logits [S, V]."""

    entropy: list[tuple[Ids, Array]] = field(default_factory=list)
    logits: list[tuple[Ids, Array]] = field(default_factory=list)


def concatenated(pieces: list[tuple[Ids, Array]]) -> tuple[Ids, Array]:
    """All positions and all values."""
    return np.concatenate([at for at, _ in pieces]), np.concatenate([values for _, values in pieces])


class Recorder:
    """A backend that copies its outputs into `sink` (None: records nothing)."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self.sink: Recording | None = None
        self._backend = backend

    def session(self, group: str) -> Session:
        session = self._backend.session(group)
        return RecordedSession(session, self, RECORDED[group]) if group in RECORDED else session

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        return self._backend.buffer(dtype, shape, place)

    @contextmanager
    def into(self, recording: Recording) -> Iterator[None]:
        self.sink = recording
        try:
            yield
        finally:
            self.sink = None


class RecordedSession:
    """One graph; one of its outputs is copied after each call."""

    def __init__(self, session: Session, recorder: Recorder, output: str) -> None:
        self._session, self._recorder, self._output = session, recorder, output

    @property
    def spec(self) -> GraphSpec:
        return self._session.spec

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        run, recorder, output = self._session.bind(buffers), self._recorder, self._output
        positions_S, values_S = buffers["positions"].array[0], buffers[output].array[0]

        def call() -> None:
            run()
            if recorder.sink is not None:
                getattr(recorder.sink, output).append((positions_S.copy(), values_S.copy()))

        return call


def with_recorder(model: Model) -> tuple[Model, Recorder]:
    """A copy of the model whose streams are recorded; streams of `model` itself are not."""
    recorder, other = Recorder(model.backend), copy.copy(model)
    other.backend = recorder
    return other, recorder

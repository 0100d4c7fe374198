"""What is done to a stream on its way through a row: one script of operations, played alone and interleaved.

A script leads from an empty stream to the whole row, by pieces of every size and by single tokens. In between it
rewinds, resets, reads other text, and generates text that it rolls back. `Playback` runs it one operation at a time, so
that several streams can be interleaved.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from blt.evaluate.cache_check.recorder import Recorder, Recording
from blt.evaluate.cache_check.text import Random
from blt.evaluate.cache_check.uncached import Row
from blt_runtime import Model, Stream
from blt_runtime.errors import CapacityError
from blt_runtime.ids import OFFSET, Ids, decode

MOST_GENERATED = 8
"""Most ids that a script generates beyond the row."""
Op = tuple[str, int]
ROLLING_BACK = ("rewind", "reset", "other", "generate")
"""Positions before these operations may be computed again, and a near boundary may then fall elsewhere."""


def make_script(n_ids: int, random: Random, *, start: int, chunk: int) -> list[Op]:
    """Operations (name, count) from `start` ids (1 after a BOS, else 0) to `n_ids`.

    "append" and "text" read the next ids; "rewind" rolls ids back; "reset" and "other" (other text, then a reset)
    start again, in the first quarter only; "generate" generates greedily and rolls back.
    """
    ops: list[Op] = []
    t = start
    while t < n_ids:
        draw = random.random()
        if draw < 0.45:
            size = min(_size(chunk, random), n_ids - t)
            ops.append(("text" if random.random() < 0.5 else "append", size))
            t += size
        elif draw < 0.8:
            steps = min(int(random.integers(1, chunk)), n_ids - t)
            ops += [("append", 1)] * steps
            t += steps
        elif draw < 0.88:
            back = min(t, int(random.geometric(0.03)))
            ops.append(("rewind", back))
            t -= back
        elif draw < 0.94:
            ops += [("generate", int(random.integers(1, MOST_GENERATED + 1)))] if t else []
        elif t < n_ids // 4:
            ops.append(("reset", 0) if random.random() < 0.5 else ("other", int(random.integers(1, 3 * chunk))))
            t = start
    return [*ops, ("append", 0)]


def _size(chunk: int, random: Random) -> int:
    """Nothing, little, up to a chunk, or more than one."""
    low, high = ((0, 2), (2, 17), (17, chunk + 2), (chunk + 1, 3 * chunk))[int(random.integers(0, 4))]
    return int(random.integers(min(low, high - 1), high))


@dataclass(frozen=True)
class Segment:
    """The part of a playback between two operations that roll back: what was computed, and the patches at its end."""

    recording: Recording
    lengths_P: Ids


class Playback:
    """One script on one stream. `segments`: what it computed; `problems`: wrong states of the stream itself."""

    def __init__(self, stream: Stream, recorder: Recorder, row: Row, script: list[Op]) -> None:
        self.row, self.segments, self.problems = row, list[Segment](), list[str]()
        self._stream, self._recorder, self._ops = stream, recorder, script[::-1]
        self._recording = Recording()
        self._reset()

    @property
    def done(self) -> bool:
        return not self._ops

    def advance(self) -> None:
        """Run the next operation; after the last one, check the stream's end."""
        name, count = self._ops.pop()
        if name in ROLLING_BACK:
            self._end_segment()
        getattr(self, f"_{name}")(count)
        if self.done:
            self._end_segment()
            if self._stream.position != len(self.row):
                self.problems.append(f"the stream ends at {self._stream.position} of {len(self.row)}")

    def _next(self, count: int) -> Ids:
        return self.row.ids_N[self._stream.position :][:count]

    def _append(self, count: int) -> None:
        with self._recorder.into(self._recording):
            self._stream.append_ids(self._next(count))

    def _text(self, count: int) -> None:
        """As a str where the bytes are UTF-8, else as bytes; special ids are appended as ids."""
        ids_S = self._next(count)
        if (ids_S < OFFSET).any():
            return self._append(count)
        text = decode(ids_S)
        with self._recorder.into(self._recording):
            try:
                self._stream.append(text.decode())
            except UnicodeDecodeError:
                self._stream.append(text)
        return None

    def _rewind(self, count: int) -> None:
        with self._recorder.into(self._recording):
            self._stream.rewind(count)

    def _reset(self, count: int = 0) -> None:
        with self._recorder.into(self._recording):
            self._stream.reset()

    def _other(self, count: int) -> None:
        """Score and append the row's own last ids, which do not belong at this position; then reset."""
        other_S = self.row.ids_N[len(self.row) // 2 :][-count:]
        with suppress(CapacityError):  # out of place they may need more patches than the row
            self._stream.score_ids(other_S)
            self._stream.append_ids(other_S)
        self._reset()

    def _generate(self, count: int) -> None:
        for _ in self._stream.generate_ids(count, temperature=0, stop_at_eos=False):
            pass
        self._rewind(count)

    def _end_segment(self) -> None:
        """End the current segment; the logits that the stream itself reports at its end belong to it."""
        stream, p = self._stream, self._stream.position
        if not np.array_equal(stream.ids, self.row.ids_N[:p]):
            self.problems.append(f"the stream's ids are not the row's first {p}")
        if p:
            self._recording.logits.append((np.array([p - 1]), stream.logits[None].copy()))
            self.segments.append(Segment(self._recording, stream.patch_lengths))
        self._recording = Recording()


def play_alone(model: Model, recorder: Recorder, row: Row, bos: bool, script: list[Op]) -> Playback:
    """A playback on a new stream."""
    playback = Playback(model.stream(bos=bos), recorder, row, script)
    while not playback.done:
        playback.advance()
    return playback


def play_interleaved(playbacks: list[Playback], random: Random) -> None:
    """All playbacks to their ends, one operation of a random one at a time."""
    waiting = list(playbacks)
    while waiting:
        i = int(random.integers(0, len(waiting)))
        waiting[i].advance()
        if waiting[i].done:
            waiting.pop(i)

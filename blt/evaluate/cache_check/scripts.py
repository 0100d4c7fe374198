"""What is done to a stream on its way through a row: the same script alone and in company.

A script leads from an empty stream to the whole row, by pieces of every size and by single tokens, and back and forth:
rewinds, resets, other text in between, generated text that is taken back. `Run` plays it one operation at a time, so
that several streams can take turns.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from blt.evaluate.cache_check.text import Random
from blt.evaluate.cache_check.truth import Row
from blt.evaluate.cache_check.watch import Taken, Watcher
from blt_runtime import Model, Stream
from blt_runtime.errors import CapacityError
from blt_runtime.ids import OFFSET, Ids, decode

AHEAD = 8
"""Most ids that a script generates beyond the row."""
Op = tuple[str, int]
GOING_BACK = ("rewind", "reset", "other", "generate")
"""What was computed before them may be computed again, and a near boundary may then fall otherwise."""


def make_script(n_ids: int, start: int, chunk: int, random: Random) -> list[Op]:
    """Operations (name, count) from `start` ids (1 behind a BOS, else 0) to `n_ids`.

    "append" and "text" take in the next ids; "rewind" takes ids back; "reset" and "other" (other text, then a reset)
    begin again, in the first quarter only; "generate" writes greedily and takes it back.
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
            ops += [("generate", int(random.integers(1, AHEAD + 1)))] if t else []
        elif t < n_ids // 4:
            ops.append(("reset", 0) if random.random() < 0.5 else ("other", int(random.integers(1, 3 * chunk))))
            t = start
    return [*ops, ("append", 0)]


def _size(chunk: int, random: Random) -> int:
    """Nothing, little, up to a chunk, or more than one."""
    low, high = ((0, 2), (2, 17), (17, chunk + 2), (chunk + 1, 3 * chunk))[int(random.integers(0, 4))]
    return int(random.integers(min(low, high - 1), high))


@dataclass(frozen=True)
class Settled:
    """A stretch of a run between two operations that lose ground: what was computed, and the patches in force."""

    taken: Taken
    lengths_P: Ids


class Run:
    """One script on one stream. `settled`: what it computed; `strange`: what was wrong with the stream itself."""

    def __init__(self, stream: Stream, watcher: Watcher, row: Row, script: list[Op]) -> None:
        self.row, self.settled, self.strange = row, list[Settled](), list[str]()
        self._stream, self._watcher, self._ops = stream, watcher, script[::-1]
        self._taken = Taken()
        self._reset()

    @property
    def done(self) -> bool:
        return not self._ops

    def advance(self) -> None:
        """The next operation, and the end of the run behind the last one."""
        name, count = self._ops.pop()
        if name in GOING_BACK:
            self._settle()
        getattr(self, f"_{name}")(count)
        if self.done:
            self._settle()
            if self._stream.position != len(self.row):
                self.strange.append(f"the stream ends at {self._stream.position} of {len(self.row)}")

    def _next(self, count: int) -> Ids:
        return self.row.ids_N[self._stream.position :][:count]

    def _append(self, count: int) -> None:
        with self._watcher.into(self._taken):
            self._stream.append_ids(self._next(count))

    def _text(self, count: int) -> None:
        """As bytes, or as a str where they are one; special ids go their own way."""
        ids_S = self._next(count)
        if (ids_S < OFFSET).any():
            return self._append(count)
        text = decode(ids_S)
        with self._watcher.into(self._taken):
            try:
                self._stream.append(text.decode())
            except UnicodeDecodeError:
                self._stream.append(text)
        return None

    def _rewind(self, count: int) -> None:
        with self._watcher.into(self._taken):
            self._stream.rewind(count)

    def _reset(self, count: int = 0) -> None:
        with self._watcher.into(self._taken):
            self._stream.reset()

    def _other(self, count: int) -> None:
        """The row's own last ids in first place, once scored and once appended: text that belongs elsewhere."""
        other_S = self.row.ids_N[len(self.row) // 2 :][-count:]
        with suppress(CapacityError):  # out of place they may need more patches than the row
            self._stream.score_ids(other_S)
            self._stream.append_ids(other_S)
        self._reset()

    def _generate(self, count: int) -> None:
        for _ in self._stream.generate_ids(count, temperature=0, stop_at_eos=False):
            pass
        self._rewind(count)

    def _settle(self) -> None:
        """Closes the stretch since the last one; the stream's own view of its end belongs to it."""
        stream, p = self._stream, self._stream.position
        if not np.array_equal(stream.ids, self.row.ids_N[:p]):
            self.strange.append(f"the stream's ids are not the row's first {p}")
        if p:
            self._taken.logits.append((np.array([p - 1]), stream.logits[None].copy()))
            self.settled.append(Settled(self._taken, stream.patch_lengths))
        self._taken = Taken()


def play_alone(model: Model, watcher: Watcher, row: Row, bos: bool, script: list[Op]) -> Run:
    """A run on a stream of its own."""
    run = Run(model.stream(bos=bos), watcher, row, script)
    while not run.done:
        run.advance()
    return run


def play_together(runs: list[Run], random: Random) -> None:
    """All runs to their ends, taking turns at random."""
    waiting = list(runs)
    while waiting:
        i = int(random.integers(0, len(waiting)))
        waiting[i].advance()
        if waiting[i].done:
            waiting.pop(i)

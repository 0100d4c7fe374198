"""The time of a byte by part, from a run whose calls are timed one by one.

Not a measurement of speed: the timing costs a few microseconds per byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from blt.bench.runs import Forced, Text, run, with_changes
from blt_runtime import Model
from blt_runtime.backends.protocol import Backend, Buffer, Call, Place, Session
from blt_runtime.bundle.spec import GraphSpec
from blt_runtime.speculation.speculate import Speculate

PARTS = ("entropy", "hashing", "encoder", "latent", "decoder", "sampling", "other")


@dataclass
class Clock:
    """Seconds and calls by part."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        for part in PARTS:
            self.seconds[part], self.calls[part] = 0.0, 0

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with its time added to `part`. The timing costs about 0.3 us per call, mostly in "other"."""
        seconds, calls, now = self.seconds, self.calls, time.perf_counter

        def timed_call(*arguments: Any) -> Any:
            began = now()
            result = call(*arguments)
            seconds[part] += now() - began
            calls[part] += 1
            return result

        return timed_call


class ClockedBackend:
    """Wraps a backend and times its calls by graph."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend, self._clock = backend, clock
        self.name = backend.name

    def session(self, group: str) -> ClockedSession:
        return ClockedSession(self._backend.session(group), self._clock)

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        return self._backend.buffer(dtype, shape, place)


class ClockedSession:
    """Wraps a session and times its bound calls."""

    def __init__(self, session: Session, clock: Clock) -> None:
        self._session, self._clock = session, clock
        self.spec: GraphSpec = session.spec

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        return self._clock.timed(self.spec.name, self._session.bind(buffers))


class ClockedSampler(Forced):
    """A forced sampler whose calls are timed."""

    def __init__(self, ids: Iterable[int], temperature: float, clock: Clock) -> None:
        super().__init__(ids, temperature)
        self._timed = clock.timed("sampling", super().__call__)

    def __call__(self, logits_V: NDArray[Any]) -> int:
        id: int = self._timed(logits_V)
        return id


@dataclass(frozen=True)
class Split:
    """Seconds per byte by part (PARTS; their sum is `total_s`), and calls of each part in `n` bytes."""

    seconds: Mapping[str, float]
    calls: Mapping[str, int]
    n: int

    def per_byte(self, part: str) -> float:
        """Calls of a part per byte."""
        return self.calls[part] / self.n

    @property
    def host_s(self) -> float:
        """Seconds per byte outside of calls of graphs."""
        return sum(self.seconds[part] for part in ("hashing", "sampling", "other"))

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def latent_call_s(self) -> float | None:
        """Seconds of one latent call; None if no patch was completed."""
        return self.seconds["latent"] * self.n / self.calls["latent"] if self.calls["latent"] else None


def split(model: Model, text: Text, temperature: float, *, speculate: Speculate = "off") -> Split:
    """The time of a byte by part, on a stream whose calls are timed one by one. "other" is the remainder: Python code
    of the stream, writing inputs, the patch rule and the timing itself."""
    clock = Clock()
    clock.clear()
    stream = with_changes(model, backend=ClockedBackend(model.backend, clock)).stream()
    for hashed in stream._memory.hashes.values():
        hashed.one = clock.timed("hashing", hashed.one)  # type: ignore[method-assign]
    sampler = ClockedSampler(text.new.tolist(), temperature, clock)
    done = run(stream, text, sampler, speculate=speculate, after_first=clock.clear)
    n = len(done.gaps_s)
    seconds = {part: clock.seconds[part] / n for part in PARTS}
    seconds["other"] = sum(done.gaps_s) / n - sum(seconds.values())
    return Split(seconds, dict(clock.calls), n)

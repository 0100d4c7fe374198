"""Batches made ahead of the step, in order.

One thread plans the block after the current one (seconds for 32 M tokens), `workers` threads fill batches out of
planned blocks, and `take` hands them over one by one. What is made depends on its place alone, never on timing, and so
not on how many workers there are. Threads and no processes: numpy gives the interpreter's lock back in the large copies
that the work consists of, planned blocks need not be copied between processes, and a kill leaves nobody behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sized
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

BATCHES_PER_WORKER = 4


class Planned(Protocol):
    """A block, which knows how many batches it has."""

    @property
    def batches(self) -> Sized: ...


B = TypeVar("B", bound=Planned)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """The batch `batch` of block `block` of an epoch; a number behind a block's last batch means the next block."""

    epoch: int
    block: int
    batch: int


class _Now:
    """Runs what it is given at once: the executor without threads."""

    def submit(self, work: Callable[..., T], /, *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """There is nothing to stop."""


class Prefetcher(Generic[B, R]):
    """Results of `assemble(block, batch)` in order of their places, over blocks `plan(epoch, block)`, without end.

    Every epoch has `n_blocks(epoch)` blocks. Errors of the work are raised where its result is taken.
    """

    def __init__(
        self,
        plan: Callable[[int, int], B],
        assemble: Callable[[B, int], R],
        n_blocks: Callable[[int], int],
        workers: int,
    ):
        self._plan, self._assemble, self._n_blocks = plan, assemble, n_blocks
        self._depth = max(1, BATCHES_PER_WORKER * workers)
        self._threads, self._plan_ahead = workers, workers > 0
        self._planner: Executor | _Now = _Now()
        self._workers: Executor | _Now = _Now()
        self.start(Position(0, 0, 0))

    def start(self, place: Position) -> None:
        """The next result is that of `place`; what was made ahead is forgotten, and threads end with what they do now.

        New ones begin when a result is asked for.
        """
        for executor in (self._planner, self._workers):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._threads:
            self._planner = ThreadPoolExecutor(1, "planner")
            self._workers = ThreadPoolExecutor(self._threads, "batches")
        self._cursor = place
        self._made: deque[tuple[int, Future[R]]] = deque()
        self._plans: dict[tuple[int, int], Future[B]] = {}

    def take(self) -> R:
        """The next result; waits for it if need be."""
        self._fill(None)
        result = self._made.popleft()[1].result()
        if self._plan_ahead:
            self._fill(None, wait=False)
        return result

    def has_next(self, epoch: int) -> bool:
        """True if the next result still belongs to `epoch`; looks no further."""
        self._fill(epoch)
        return bool(self._made) and self._made[0][0] == epoch

    def _fill(self, last_epoch: int | None, wait: bool = True) -> None:
        """Work for the places from the cursor on. Waits for a plan only if nothing at all was made ahead and `wait`."""
        while len(self._made) < self._depth and (last_epoch is None or self._cursor.epoch <= last_epoch):
            here = self._cursor
            key = (here.epoch, here.block)
            following = self._following(*key)
            future = self._planned(key)
            if self._plan_ahead:
                self._planned(following)
            if not future.done() and (self._made or not wait):
                return
            block = future.result()
            if here.batch < len(block.batches):
                self._made.append((here.epoch, self._workers.submit(self._assemble, block, here.batch)))
                self._cursor = Position(*key, here.batch + 1)
            else:
                self._cursor = Position(*following, 0)
                self._plans.pop(key)

    def _planned(self, key: tuple[int, int]) -> Future[B]:
        if key not in self._plans:
            self._plans[key] = self._planner.submit(self._plan, *key)
        return self._plans[key]

    def _following(self, epoch: int, block: int) -> tuple[int, int]:
        return (epoch, block + 1) if block + 1 < self._n_blocks(epoch) else (epoch + 1, 0)

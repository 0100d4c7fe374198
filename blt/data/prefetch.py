"""Batches prepared ahead of the step, in order.

One thread plans the block after the current one (seconds for 32 M tokens, longer if the entropy model runs), `workers`
threads fill batches from planned blocks, and `take` returns them one by one. A batch depends only on its position, not
on timing or the number of workers. Threads, not processes: numpy releases the interpreter lock in the large copies that
make up the work, planned blocks need no copy between processes, and a kill leaves no worker process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sized
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, Generic, Protocol, TypeVar

BATCHES_PER_WORKER = 4


class Planned(Protocol):
    """A block with a number of batches."""

    @property
    def batches(self) -> Sized: ...


B = TypeVar("B", bound=Planned)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """The batch number `batch` of block `block` of an epoch; a number after the last batch means the next block."""

    epoch: int
    block: int
    batch: int


class _InlineExecutor:
    """The executor without threads: runs work when it is submitted."""

    def submit(self, work: Callable[..., T], /, *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Nothing is pending."""


class Prefetcher(Generic[B, R]):
    """The endless sequence of `assemble(block, batch)`, in order of position, over the blocks
    `plan(epoch, block, stopped)`.

    Every epoch has `n_blocks(epoch)` blocks. A block that is not `wanted(epoch, block)` is planned when it is needed.
    A long plan may end with any error once `stopped()` is true: its result is not needed then. Another error in the
    work is raised by the `take` of its result.
    """

    def __init__(
        self,
        plan: Callable[[int, int, Callable[[], bool]], B],
        assemble: Callable[[B, int], R],
        n_blocks: Callable[[int], int],
        workers: int,
        wanted: Callable[[int, int], bool] = lambda epoch, block: True,
    ):
        self._plan, self._assemble, self._n_blocks, self._wanted = plan, assemble, n_blocks, wanted
        self._depth = max(1, BATCHES_PER_WORKER * workers)
        self._threads, self._plan_ahead = workers, workers > 0
        self._stopped = Event()
        self._planner: Executor | _InlineExecutor = _InlineExecutor()
        self._workers: Executor | _InlineExecutor = _InlineExecutor()
        self.start(Position(0, 0, 0))

    def start(self, position: Position) -> None:
        """Continues at `position`: prepared results are dropped, plans are stopped, and threads end after their current
        work.

        New threads start with the next `take`.
        """
        self._stopped.set()
        self._stopped = Event()
        for executor in (self._planner, self._workers):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._threads:
            self._planner = ThreadPoolExecutor(1, "planner")
            self._workers = ThreadPoolExecutor(self._threads, "batches")
        self._cursor = position
        self._ready: deque[tuple[int, Future[R]]] = deque()
        self._plans: dict[tuple[int, int], Future[B]] = {}

    def take(self) -> R:
        """The next result; waits for it if necessary."""
        self._fill(None)
        result = self._ready.popleft()[1].result()
        if self._plan_ahead:
            self._fill(None, wait=False)
        return result

    def has_next(self, epoch: int) -> bool:
        """Whether the next result belongs to `epoch`; plans no later epoch."""
        self._fill(epoch)
        return bool(self._ready) and self._ready[0][0] == epoch

    def _fill(self, last_epoch: int | None, wait: bool = True) -> None:
        """Submits work from the cursor on. Waits for a plan only if no result is ready or under way, and `wait`."""
        while len(self._ready) < self._depth and (last_epoch is None or self._cursor.epoch <= last_epoch):
            here = self._cursor
            key = (here.epoch, here.block)
            following = self._following(*key)
            future = self._planned(key)
            if self._plan_ahead and following not in self._plans and self._wanted(*following):
                self._planned(following)
            if not future.done() and (self._ready or not wait):
                return
            block = future.result()
            if here.batch < len(block.batches):
                self._ready.append((here.epoch, self._workers.submit(self._assemble, block, here.batch)))
                self._cursor = Position(*key, here.batch + 1)
            else:
                self._cursor = Position(*following, 0)
                self._plans.pop(key)

    def _planned(self, key: tuple[int, int]) -> Future[B]:
        if key not in self._plans:
            self._plans[key] = self._planner.submit(self._plan, *key, self._stopped.is_set)
        return self._plans[key]

    def _following(self, epoch: int, block: int) -> tuple[int, int]:
        return (epoch, block + 1) if block + 1 < self._n_blocks(epoch) else (epoch + 1, 0)

"""Several worker processes on one listening socket, started, watched and replaced by a parent.

The parent binds the socket and forks before anything opens the bundle, so that a replacement starts from the same
state: the parent has no session of ONNX Runtime, no model and no thread. The workers share the socket, and with it the
queue of connections that no worker has accepted yet. A connection in it survives the end of a worker, which
SO_REUSEPORT would not give: there each worker has its own queue, which the system fills by chance. A worker with more
connections than another leaves the next one to that (`Listener`).

A worker obeys its parent and no signals, because a terminal and systemd send theirs to all processes of a service. It
ends at once when the parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from starlette.applications import Starlette

from ..errors import BltError
from . import metrics
from .run import BACKLOG, CLOSING_SECONDS, SIGNALS, Stop, seconds_to_end, serving

log = logging.getLogger("blt_runtime.server")
STARTS = 5
"""Starts that may fail one after the other before the parent gives up."""
LASTING_SECONDS = 60.0
"""After which a worker's end is no sign that its replacement would end soon too."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a worker is replaced that did not last; the pause doubles each time."""
KILL_SECONDS = 10.0
"""How long workers that should have ended are waited for before they are killed."""
WATCH_SECONDS = 1.0
LEAVE_TIMES = 20
_NONE = 1 << 30
"""Connections of a place without a worker: more than any worker has."""
_FORK = multiprocessing.get_context("fork")


def serve(
    make: Callable[[], Starlette],
    sock: socket.socket,
    *,
    workers: int,
    drain: float,
    ready: Callable[[], None],
) -> int:
    """Serves in `workers` processes until SIGTERM or Ctrl-C, and returns the signal's number: see `run.serve`.

    make: called in each worker, opens the model and makes the application. ready: called once all workers accept
    requests. Raises what `make` raises in the first worker that fails, and BltError for one that ends before it is
    ready. A worker that ends later is replaced. If its replacements fail at their start too, the others are drained
    and the error is raised. Fork safety: the calling process should have no threads.
    """
    with (
        tempfile.TemporaryDirectory(prefix="blt-metrics-", ignore_cleanup_errors=True) as folder,
        _signals() as arrived,
    ):
        open_W = memoryview(mmap.mmap(-1, 4 * workers)).cast("i")
        parent = _Parent(_Job(make, sock, open_W, drain, folder), workers, arrived, ready)
        try:
            parent.run()
        finally:
            parent.kill()
            sock.close()
    if parent.error is not None:
        raise parent.error
    return parent.received[0]


class _Job:
    """What each worker does."""

    def __init__(
        self, make: Callable[[], Starlette], sock: socket.socket, open_W: memoryview[int], drain: float, folder: str
    ) -> None:
        self.make, self.sock, self.open_W, self.drain, self.folder = make, sock, open_W, drain, folder

    def run(self, number: int, parent: Connection) -> None:
        """Serves, as worker `number` of the parent at the other end of the connection."""
        metrics.share(self.folder, number)
        orders = _Orders(parent, self.folder)
        try:
            app = self.make()
        except Exception as error:
            if not isinstance(error, BltError):
                log.error("a worker failed at its start with an unexpected error", exc_info=error)
            parent.send(_picklable(error))
            return
        scheduler, watches = app.state.service.scheduler, []

        async def watch(stop: Stop) -> None:
            while scheduler.alive:
                await asyncio.sleep(WATCH_SECONDS)
            stop(0.0)

        def obey(stop: Stop) -> None:
            loop = asyncio.get_running_loop()

            def order(limit: float) -> None:
                loop.call_soon_threadsafe(stop, limit)

            orders.obey(order)
            watches.append(asyncio.create_task(watch(stop)))

        self.open_W[number] = 0
        sock = Listener(self.sock.detach(), self.open_W, number)
        asyncio.run(serving(app, sock, 1, lambda: parent.send(None), obey))


class Listener(socket.socket):
    """A worker's listening socket, of the same file as those of the other workers.

    open_W: the open connections of each worker, in memory that all share. `accept` raises BlockingIOError, as if
    another worker had been faster, if this one has more than the least. It does so for LEAVE_TIMES milliseconds, after
    which it takes the connection that the others did not.
    """

    def __init__(self, fileno: int, open_W: memoryview[int], number: int) -> None:
        super().__init__(fileno=fileno)
        self._open_W, self._number, self._left = open_W, number, 0

    def listen(self, backlog: int = BACKLOG, /) -> None:
        """Lets BACKLOG connections wait. asyncio passes how many it accepts at a time."""
        super().listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        if self._open_W[self._number] > min(self._open_W) and self._left < LEAVE_TIMES:
            self._left += 1
            time.sleep(0.001)
            raise BlockingIOError
        self._left = 0
        accepted, address = super().accept()
        self._count(1)
        return _Accepted(accepted.detach(), lambda: self._count(-1)), address

    def _count(self, more: int) -> None:
        self._open_W[self._number] += more


class _Accepted(socket.socket):
    """Calls `closed` when it is closed."""

    def __init__(self, fileno: int, closed: Callable[[], None]) -> None:
        super().__init__(fileno=fileno)
        self._closed_now = closed

    def close(self) -> None:
        if self.fileno() >= 0:
            self._closed_now()
        super().close()


class _Orders:
    """A thread that receives a parent's orders to end, and ends the process when the parent is gone."""

    def __init__(self, parent: Connection, folder: str) -> None:
        self._parent, self._folder = parent, folder
        self._lock = threading.Lock()
        self._stop: Stop = self._leave
        threading.Thread(target=self._receive, name="blt-orders", daemon=True).start()

    def obey(self, stop: Stop) -> None:
        """Orders go to `stop` from now on. Before, they end the process."""
        with self._lock:
            self._stop = stop

    def _receive(self) -> None:
        try:
            while True:
                limit = self._parent.recv()
                with self._lock:
                    self._stop(limit)
        except (EOFError, OSError):
            shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            os._exit(1)

    @staticmethod
    def _leave(_: float) -> None:
        os._exit(0)


class _Place:
    """One of the N places for a worker, and the worker in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None
        self.error: BaseException | None = None
        self.ready = False
        self.began = self.due = 0.0
        self.failed = self.short = 0  # starts, and lives, one after the other


class _Parent:
    def __init__(self, job: _Job, workers: int, arrived: socket.socket, ready: Callable[[], None]) -> None:
        self._job, self._arrived, self._ready = job, arrived, ready
        self._places = [_Place(number) for number in range(workers)]
        for place in self._places:
            job.open_W[place.number] = _NONE
        self._announced = False
        self._kill_at: float | None = None  # set when the workers must end
        self.error: BaseException | None = None
        self.received: list[int] = []

    def run(self) -> None:
        """Returns when all workers have ended."""
        while self._kill_at is None or any(place.process for place in self._places):
            now = time.monotonic()
            if self._kill_at is None:
                for place in self._places:
                    if place.process is None and place.due <= now:
                        self._start(place)
            elif self._kill_at <= now:
                self.kill()
            heard = {place.connection: place for place in self._places if place.connection is not None}
            for found in wait([self._arrived, *heard], self._seconds(now)):
                if found is self._arrived:
                    self._signalled()
                else:
                    self._hear(heard[found])  # type: ignore[index]

    def kill(self) -> None:
        """Kills the workers that are left."""
        for place in self._places:
            if place.process is not None:
                place.process.kill()
                self._gone(place)

    def _seconds(self, now: float) -> float | None:
        """Until something is due."""
        due = (
            [place.due for place in self._places if place.process is None] if self._kill_at is None else [self._kill_at]
        )
        return max(0.0, min(due) - now) if due else None

    def _start(self, place: _Place) -> None:
        place.connection, theirs = _FORK.Pipe()
        place.process = _FORK.Process(target=self._in_worker, args=(place.number, theirs), daemon=True)
        place.ready, place.error, place.began = False, None, time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the worker ignores them
        try:
            place.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()

    def _in_worker(self, number: int, connection: Connection) -> None:
        signal.set_wakeup_fd(-1)
        for chosen in SIGNALS:
            signal.signal(chosen, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for place in self._places:  # the parent alone holds these ends, so that they close when it is killed
            if place.connection is not None:
                place.connection.close()
        self._job.run(number, connection)

    def _signalled(self) -> None:
        self.received += [number for number in self._arrived.recv(64) if number in SIGNALS]
        if self.received:
            self._end(seconds_to_end(self.received, self._job.drain))

    def _end(self, limit: float) -> None:
        """Orders all workers to end within `limit` seconds."""
        self._kill_at = time.monotonic() + limit + CLOSING_SECONDS + KILL_SECONDS
        for place in self._places:
            if place.connection is not None:
                with contextlib.suppress(OSError):  # it has ended
                    place.connection.send(limit)

    def _hear(self, place: _Place) -> None:
        assert place.connection is not None
        try:
            place.error = place.connection.recv()
        except (EOFError, OSError):
            self._ended(place)
            return
        place.ready = place.error is None
        place.failed = 0 if place.ready else place.failed
        if not self._announced and all(place.ready for place in self._places):
            self._announced = True
            self._ready()

    def _ended(self, place: _Place) -> None:
        assert place.process is not None
        pid, lived = place.process.pid, time.monotonic() - place.began
        how = _how(self._gone(place))
        if self._kill_at is not None:
            return
        place.failed += not place.ready
        if not place.ready and (not self._announced or place.failed == STARTS):
            self.error = place.error or BltError(f"a worker {how} before it was ready")
            self._end(self._job.drain if self._announced else 0.0)
            return
        place.short = 0 if lived >= LASTING_SECONDS else place.short + 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (place.short - 1)) if place.short else 0.0
        place.due = time.monotonic() + pause
        why = f" ({place.error})" if place.error else ""
        log.error("worker %d %s%s; another one starts in %g s", pid, how, why, pause)

    def _gone(self, place: _Place) -> int | None:
        """Forgets a worker that has ended or was killed. Its exit code."""
        assert place.process is not None
        assert place.connection is not None
        place.process.join()
        code = place.process.exitcode
        place.process.close()
        place.connection.close()
        place.process = place.connection = None
        self._job.open_W[place.number] = _NONE
        metrics.forget(self._job.folder, place.number)
        return code


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Inside, SIGTERM and SIGINT do nothing but arrive at a socket, as their numbers."""
    arrived, sent = socket.socketpair()
    with arrived, sent:
        sent.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        old = signal.set_wakeup_fd(sent.fileno())
        try:
            yield arrived
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)


def _how(code: int | None) -> str:
    """How a process with this exit code ended."""
    return f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return BltError(f"{type(error).__name__}: {error}")
    return error

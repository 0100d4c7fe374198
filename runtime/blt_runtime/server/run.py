"""Runs the application in uvicorn: limits on connections, and an orderly end at SIGTERM and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator, Sequence

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UsageError, shown
from .app import Service

log = logging.getLogger("blt_runtime.server")
HEAD_BYTES = 32 << 10
"""Most bytes of a request's line and headers."""
HEAD_SECONDS = 20.0
"""Within which they must arrive."""
IDLE_SECONDS = 60
"""After which a connection without a request is closed."""
UNREAD_SECONDS = 60
"""After which a connection is closed whose client reads nothing, or is no longer there."""
CLOSING_SECONDS = 2
BACKLOG = 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, which refuses connections until it is served; port 0 lets the system choose. Raises
    UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"cannot listen on {shown(host)}, port {port}: {reason}") from error
    # Accepted connections inherit these.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def url(sock: socket.socket) -> str:
    """The address of a listening socket, as a client on this machine writes it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """A connection that is closed if the head of a request does not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


Stop = Callable[[float], None]
"""Ends a server: new requests are refused, the others have so many seconds. A later call can only shorten them."""


def serve(app: Starlette, sock: socket.socket, *, drain: float, ready: Callable[[], None]) -> int:
    """Serves until SIGTERM or Ctrl-C, and returns the signal's number. ready: called once requests are accepted.

    At SIGTERM the server refuses new requests (503, also `/ready`), waits up to `drain` seconds for the others, and
    ends. Ctrl-C, or a second signal, ends it at once.
    """
    received: list[int] = []

    def obey(stop: Stop) -> None:
        def signalled(number: int) -> None:
            received.append(number)
            stop(seconds_to_end(received, drain))

        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, signalled, number)

    asyncio.run(serving(app, sock, BACKLOG, ready, obey))
    return received[0] if received else 0


def seconds_to_end(received: Sequence[int], drain: float) -> float:
    """How long running requests have after these signals: `drain` after one SIGTERM, else no time."""
    return drain if received == [signal.SIGTERM] else 0.0


async def serving(
    app: Starlette, sock: socket.socket, backlog: int, ready: Callable[[], None], obey: Callable[[Stop], None]
) -> None:
    """Serves until stopped. obey: called first, in the event loop, with what stops the server. backlog: connections
    that wait, and how many are accepted at a time."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        backlog=backlog,
    )
    server, service = _Server(config), app.state.service
    assert isinstance(service, Service)
    ending: list[asyncio.Task[None]] = []
    obey(lambda limit: ending.append(asyncio.create_task(_end(server, service, limit))))
    running = asyncio.create_task(server.serve([sock]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await running


async def _end(server: uvicorn.Server, service: Service, limit: float) -> None:
    if not await service.admission.drained(limit):
        log.warning("%d requests had not ended and were cancelled", service.admission.open)
    await asyncio.to_thread(service.scheduler.close)
    server.should_exit = True
